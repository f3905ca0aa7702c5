"""The kinds of findings, with severity and meaning.

After a finding of ``FILES`` no load can be planned: exit code 2. Text from a checkpoint goes
through ``clean`` before it is shown, since names may hold any characters.
"""

from __future__ import annotations

from vllm_moe_compat.checkpoint.files import FileFault
from vllm_moe_compat.commands.inspect.model import Problem, Severity
from vllm_moe_compat.plan.faults import Fault

FILES: dict[str, tuple[Severity, str]] = {
    "no-weights": ("error", "there is no `model*.safetensors`, which is all that mlx-lm loads"),
    "shard-unreadable": ("error", "a shard is truncated, malformed, no regular file or not ours"),
    "headers-too-large": ("error", "the headers together are larger than any real checkpoint's"),
    "config-missing": ("error", "there is no `config.json`"),
    "config-unreadable": ("error", "`config.json` is no JSON object, or absurdly large or deep"),
}
PROBLEMS: dict[str, tuple[Severity, str]] = {
    **FILES,
    "tensor-duplicate": ("error", "a tensor is in two shards, or twice in one header"),
    "index-unreadable": ("error", "the index is no JSON with a `weight_map`"),
    "index-duplicate": ("error", "the index names a tensor twice"),
    "index-outside": ("error", "the index names a file outside the folder"),
    "index-missing-file": ("error", "the index names a file that is not there"),
    "index-missing-tensor": ("error", "a shard lacks tensors that the index puts there"),
    "index-other-file": ("error", "the index names a file that mlx-lm does not load"),
    "index-extra": ("warning", "shards hold tensors that the index does not name"),
    "link-outside": ("warning", "a shard is a link that leaves the folder and the hub's cache"),
    "single-file": ("note", "one shard of several: it is described, and nothing is planned"),
    "model-type": ("error", "`config.json` has no `model_type`, by which mlx-lm picks its module"),
    "module-unknown": ("error", "mlx-lm has no module for this `model_type`"),
    "module-unmapped": ("note", "the registry has no row for the module: mlx-lm loads it as it is"),
    "experts-unmapped": ("warning", "the module has no row, and the experts come one by one"),
    "fp8-unmapped": ("error", "the module has no row, and would take FP8 for integers"),
    "own-code": ("warning", "the checkpoint brings its own model code, which is not looked into"),
    "config-number": ("error", "a number in `config.json` that is needed means nothing"),
    "config-unsupported": ("error", "mlx-lm's module cannot represent what `config.json` asks for"),
    "experts-none": ("warning", "the config speaks of experts, and no layer has any"),
    "experts-twice": ("error", "a layer has its experts twice"),
    "experts-gap": ("error", "experts are missing, or there are more than the config says"),
    "experts-contradict": ("error", "projections are missing, or their shapes do not fit"),
    "experts-unlike": ("error", "single experts differ from the others in shape or dtype"),
    "experts-unsupported": ("error", "experts in a form or a place that the module cannot take"),
    "fp8-scales": ("error", "an FP8 weight without a scale, or a scale that does not fit"),
    "fp8-unsupported": ("error", "FP8 of a kind that MLX cannot give the value of"),
    "plan-impossible": ("error", "the tensors' shapes do not allow what has to be done to them"),
    "mtp-disagree": ("note", "config and tensors disagree on heads that predict further tokens"),
    "vision-disagree": ("note", "config and tensors disagree on towers for images or sound"),
    "quantized-already": ("error", "`VLLM_MOE_COMPAT_QUANTIZE` does not apply to this checkpoint"),
    "quantize-unmapped": ("error", "the module has no row, and `VLLM_MOE_COMPAT_QUANTIZE` is set"),
    "memory": ("warning", "what the setting in force takes exceeds this machine's memory"),
}
_LONGEST = 1500


def clean(text: object, longest: int = _LONGEST) -> str:
    """Return the text without control characters and surrogates, cut to a length."""
    words = str(text)
    words = words if len(words) <= longest else f"{words[: longest - 1]}…"
    if words.isprintable():
        return words
    return "".join(c if c.isprintable() else "?" for c in words)


def problem(id: str, message: object, remedy: object = "") -> Problem:
    """Make a finding of a kind in ``PROBLEMS``."""
    return Problem(id, PROBLEMS[id][0], clean(message), clean(remedy))


def of_fault(fault: FileFault) -> Problem:
    """Make the finding for a faulty file."""
    return problem(fault.id, fault.message, fault.remedy)


def of_error(id: str, error: Exception) -> Problem:
    """Make the finding for an exception; its message ends with the remedy."""
    message, _, remedy = str(error).removesuffix(".").rpartition("; ")
    return problem(id, message or remedy, remedy if message else "")


def of_load(fault: Fault) -> Problem:
    """Make a finding of a fault of the planned load."""
    return problem(fault.id, fault.message, fault.remedy)
