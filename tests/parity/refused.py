"""The refused cells and the words of their errors; every other cell must load.

Keys are a family and a form; the words must be in the error.
"""

_DENSE = "mlx-lm's module makes every layer a MoE layer"

REFUSED: dict[tuple[str, str], str] = {
    # transformers' own tensors are of two counts: gate and up for the experts that do
    # nothing too, down without them. No release is like that.
    ("longcat_flash", "in-library"): "beside a gate_up of",
    **{
        ("qwen2_moe mixed", form): _DENSE
        for form in ("saved", "in-library", "release", "block FP8")
    },
}
