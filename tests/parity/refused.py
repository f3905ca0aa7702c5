"""The refused cells and the words of their errors; every other cell must load.

Keys are a family and a form; the words must be in the error.
"""

from vllm_moe_compat.families.installed import lacks

_DENSE = "mlx-lm's module makes every layer a MoE layer"

_FOUR = ("saved", "in-library", "release", "block FP8")

REFUSED: dict[tuple[str, str], str] = {
    # transformers' own tensors are of two counts: gate and up for the experts that do
    # nothing too, down without them. No release is like that.
    ("longcat_flash", "in-library"): "beside a gate_up of",
    **{("qwen2_moe mixed", form): _DENSE for form in _FOUR},
}
if lacks("qwen3_5", "if self.fa_idx is not None"):
    REFUSED |= {("qwen3_5 softmax", form): "layer_types has full_attention" for form in _FOUR}
if lacks("mistral3", "mistral4"):
    words = "model_type of text_config is 'mistral4', which the installed mlx-lm does not have"
    REFUSED |= {("mistral3 mistral4", form): words for form in (*_FOUR, "per-expert w1/w2/w3")}
