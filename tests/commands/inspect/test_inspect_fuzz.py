"""Valid checkpoints with something changed in them: always a report, never a traceback.

A longer search, with other examples each time:
``INSPECT_EXAMPLES=20000 scripts/test tests/commands/inspect/test_inspect_fuzz.py``. What it
finds goes into the corpus.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.inspect_files import checkpoint, write
from vllm_moe_compat.commands.inspect import as_json, markdown, text
from vllm_moe_compat.commands.inspect.collect import inspect
from vllm_moe_compat.commands.inspect.model import Inspection
from vllm_moe_compat.commands.inspect.problems import PROBLEMS
from vllm_moe_compat.families.registry import TRANSFORMS_BY_MODULE

EXAMPLES = settings(
    deadline=None,
    derandomize="INSPECT_EXAMPLES" not in os.environ,
    max_examples=int(os.environ.get("INSPECT_EXAMPLES", "60")),
    suppress_health_check=list(HealthCheck),
)
GOOD = checkpoint(experts=2, layers=2)
MODULES = (
    *(row.rpartition(".")[2] for row in TRANSFORMS_BY_MODULE),
    *("gemma", "mamba", "hunyuan_v1_moe", "qwen3_5_moe_text", "kimi_k2", "nothing"),
)
KEYS = (
    *GOOD["config.json"]["json"],
    *("text_config", "vision_config", "quantization", "rope_scaling", "rope_parameters"),
    *("layer_types", "mlp_layer_types", "sliding_window", "kv_lora_rank", "qk_rope_head_dim"),
    *("mtp_num_hidden_layers", "num_nextn_predict_layers", "model_file", "num_local_experts"),
    *("linear_num_value_heads", "linear_attn_config", "hybrid_override_pattern", "n_groups"),
    *("mlp_only_layers", "first_k_dense_replace", "per_layer_config", "full_attention_interval"),
    *("attn_layer_period", "expert_layer_offset", "expert_layer_period", "layers_block_type"),
    *("qk_nope_head_dim", "num_kv_shared_layers", "mamba_n_heads", "sliding_window_pattern"),
    *("partial_rotary_factor", "moe_latent_size", "weight_block_size", "config_groups"),
)
WORDS = st.sampled_from(
    [
        *("", "full_attention", "sliding_attention", "linear_attention", "fp8"),
        *("compressed-tensors", "modelopt", "M*-E", "[red]", "\ud800", "\x1b[2J", "../../x"),
        *("128x128", "dense", "sparse"),
    ]
)
NUMBERS = st.sampled_from([0, 1, -1, 2, 3, 4, 128, 2**31, 2**63, 10**40, 0.5, 1e400, -(2**64)])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from([*KEYS, "0", "weights", "type", "rope_type"]), inner)
    ),
    max_leaves=8,
)


def report(files: dict[str, Any]) -> Inspection:
    """Inspect in every format; what comes out must be sound whatever went in."""
    with tempfile.TemporaryDirectory() as folder:
        found = inspect(str(write(Path(folder), files)))
    assert found.exit_code in (0, 1, 2)
    assert (found.exit_code == 0) == all(f.severity != "error" for f in found.findings)
    for finding in found.findings:
        assert finding.severity == PROBLEMS[finding.id][0]
        assert finding.message
    json.loads(as_json.render(found))
    for rendered in (text.render(found), markdown.render(found)):
        rendered.encode("utf-8")
        assert "\x1b" not in rendered
    return found


@EXAMPLES
@given(data=st.data())
def test_any_config(data: st.DataObject):
    files = copy.deepcopy(GOOD)
    config = files["config.json"]["json"]
    config["model_type"] = data.draw(st.sampled_from(MODULES))
    for key in data.draw(st.lists(st.sampled_from(KEYS), max_size=6)):
        if data.draw(st.booleans()):
            config[key] = data.draw(VALUES)
        else:
            config.pop(key, None)
    if data.draw(st.booleans()):
        files["config.json"]["json"] = {
            "model_type": config.get("model_type"),
            "text_config": config,
        }
    report(files)


SIDES = st.sampled_from([0, 1, 2, 3, 16, 32, 33, 64, 128, 2**31, 2**62])
DTYPES = st.sampled_from(["F8_E4M3", "F8_E5M2", "F8_E8M0", "BF16", "F32", "U8", "I8", "F4", "X"])
PLACES = ("model.layers.0.", "model.layers.99.", "mtp.layers.0.", "model.visual.", "")
ENDS = (
    *("mlp.experts.0.up_proj.weight", "mlp.experts.7.w1.weight", "mlp.experts.gate_up_proj"),
    *("mlp.experts.down_proj", "mlp.switch_mlp.up_proj.weight", "mlp.experts.0.up_proj.bias"),
    *("self_attn.kv_b_proj.weight", "block_sparse_moe.input_linear.weight", "conv1d.weight"),
    *("mlp.experts.down_proj_scale_inv", "mlp.experts.down_proj_blocks", "norm.weight"),
    *("mlp.experts.0.up_proj.weight_scale", "self_attn.k_scale", "e_score_correction_bias"),
    *("mlp.gate_up_proj.weight", "x.scales", "\u202e[bold]", "experts..weight"),
)


@EXAMPLES
@given(data=st.data())
def test_any_tensors(data: st.DataObject):
    files = copy.deepcopy(GOOD)
    header = files["model.safetensors"]["shard"]
    for _ in range(data.draw(st.integers(1, 5))):
        if header and data.draw(st.booleans()):
            name = data.draw(st.sampled_from(sorted(header)))
        else:
            name = data.draw(st.sampled_from(PLACES)) + data.draw(st.sampled_from(ENDS))
        if data.draw(st.booleans()):
            header.pop(name, None)
            continue
        shape = data.draw(st.lists(SIDES, max_size=4))
        header[name] = {"dtype": data.draw(DTYPES), "shape": shape, "data_offsets": [0, 0]}
    size = _lay_out(header)
    files["model.safetensors"]["data"] = min(size, 2**40)
    if data.draw(st.booleans()):
        del files["model.safetensors.index.json"]
    files["config.json"]["json"]["model_type"] = data.draw(st.sampled_from(MODULES))
    report(files)


def _lay_out(header: dict[str, Any]) -> int:
    end = 0
    for entry in header.values():
        width = {"BF16": 2, "F32": 4}.get(entry["dtype"], 1)
        size = width
        for side in entry["shape"]:
            size *= side
        entry["data_offsets"] = [end, end + size]
        end += size
    return end


@EXAMPLES
@given(data=st.data())
def test_any_bytes_in_the_header_or_the_index(data: st.DataObject):
    files = copy.deepcopy(GOOD)
    name = data.draw(st.sampled_from(["model.safetensors", "model.safetensors.index.json"]))
    what = files[name]
    content = json.dumps(what["shard"] if "shard" in what else what["json"])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        put = data.draw(
            st.sampled_from(['"', "{", "}", "[", ",", "0", "-", "9" * 30, "\\u0000", "é", ""])
        )
        content = content[:place] + put + content[place + data.draw(st.integers(0, 2)) :]
    if "shard" in what:
        files[name] = {"header": content, "data": what["data"]}
    else:
        files[name] = {"text": content}
    report(files)
