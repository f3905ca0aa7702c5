"""The kinds of findings, with severity and meaning.

After a finding of ``FILES`` no load can be planned: exit code 2. Text from a checkpoint goes
through ``clean`` before it is shown, since names may hold any characters.
"""

from __future__ import annotations

from vllm_moe_compat.checkpoint.files import FileFault
from vllm_moe_compat.checkpoint.numbers import FORMS
from vllm_moe_compat.commands.inspect.model import Problem, Severity
from vllm_moe_compat.plan.faults import Fault

_ERROR: Severity = "error"
FILES: dict[str, tuple[Severity, str]] = {
    "adapter-alone": ("error", "the folder holds an adapter and no model"),
    "no-weights": ("error", "there is no `model*.safetensors`; mlx-lm loads no other files"),
    "shard-unreadable": (
        "error",
        "a shard is truncated, malformed, not a regular file, or not readable",
    ),
    "headers-too-large": ("error", "the headers together are larger than any real checkpoint's"),
    "config-missing": ("error", "there is no `config.json`"),
    "config-unreadable": (
        "error",
        "`config.json` is no JSON object, or exceeds the limits below",
    ),
}
PROBLEMS: dict[str, tuple[Severity, str]] = {
    **FILES,
    "tensor-duplicate": ("error", "a tensor is in two shards, or twice in one header"),
    "index-unreadable": ("error", "the index is not JSON with a `weight_map`"),
    "index-duplicate": ("error", "the index names a tensor twice"),
    "index-outside": ("error", "the index names a file outside the folder"),
    "index-missing-file": ("error", "the index names a file that is not there"),
    "index-missing-tensor": ("error", "a shard lacks tensors that the index puts there"),
    "index-other-file": ("error", "the index names a file that mlx-lm does not load"),
    "index-stale": ("warning", "the index describes other files; mlx-lm does not read it"),
    "index-extra": ("warning", "shards hold tensors that the index does not name"),
    "names-unknown": ("error", "the module has no weights of these names"),
    "adapter-unmerged": ("error", "tensors of an adapter that is not merged"),
    "adapter-beside": ("warning", "an adapter lies beside the weights; it is not applied"),
    "head-missing": ("error", "the config asks for an output head, and there is none"),
    "head-differs": ("warning", "tied embeddings, and a different output head, which is used"),
    "link-outside": ("warning", "a shard is a link that leaves the folder and the hub's cache"),
    "single-file": ("note", "one shard of several: described without a plan"),
    "model-type": ("error", "`config.json` has no `model_type`, by which mlx-lm picks its module"),
    "module-unknown": ("error", "mlx-lm has no module for this `model_type`"),
    "module-unmapped": (
        "note",
        "the registry has no row for the module: mlx-lm loads it alone",
    ),
    "experts-unmapped": ("warning", "the module has no row, and the experts come one by one"),
    **{
        f"{form.name}-unmapped": (
            _ERROR,
            f"the module has no row; it cannot read {form.title}",
        )
        for form in FORMS
    },
    "own-code": ("warning", "the checkpoint brings its own model code, which is not examined"),
    "config-number": ("error", "a required number in `config.json` is not valid"),
    "config-unsupported": ("error", "mlx-lm's module cannot represent what `config.json` asks for"),
    "settings-unresolved": (
        "warning",
        "transformers is not installed, so settings that `config.json` leaves out are unknown",
    ),
    "setting-fixed": (
        "error",
        "`config.json` has a setting that mlx-lm's module computes with other values only",
    ),
    "setting-unknown": (
        "warning",
        "`config.json` has a setting, other than its default, that nobody has tried",
    ),
    "experts-none": ("warning", "the config declares experts, and no layer has any"),
    "experts-twice": ("error", "a layer has its experts twice"),
    "experts-gap": ("error", "experts are missing, or there are more than in the config"),
    "experts-contradict": ("error", "projections are missing, or their shapes do not fit"),
    "experts-unlike": ("error", "single experts differ from the others in shape or dtype"),
    "experts-unsupported": ("error", "experts in a form or a place that the module cannot take"),
    **{
        f"{form.name}-{kind}": (_ERROR, words)
        for form in FORMS
        for kind, words in form.faults.items()
    },
    "packed-unsupported": (
        "error",
        "packed weights that neither mlx-lm nor this package reads",
    ),
    "form-unsupported": (
        "error",
        "quantised weights in a form that neither mlx-lm nor this package reads",
    ),
    "plan-impossible": ("error", "a planned operation does not fit the tensors' shapes"),
    "mtp-disagree": ("note", "config and tensors disagree on heads that predict further tokens"),
    "vision-disagree": ("note", "config and tensors disagree on towers for images or sound"),
    "quantized-already": ("error", "`VLLM_MOE_COMPAT_QUANTIZE` does not apply to this checkpoint"),
    "quantize-unmapped": ("error", "the module has no row, and `VLLM_MOE_COMPAT_QUANTIZE` is set"),
    "length-limited": ("warning", "the module ignores a setting that matters in long sequences"),
    "expert-cache": (
        "error",
        "`VLLM_MOE_COMPAT_EXPERT_CACHE` is set, and is too small for a token, or the experts "
        "cannot be read one by one",
    ),
    "memory": ("warning", "with the current setting, loading exceeds this machine's memory"),
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
    severity, _ = PROBLEMS.get(id, (_ERROR, ""))  # A number form may be added while we run.
    return Problem(id, severity, clean(message), clean(remedy))


def of_fault(fault: Fault | FileFault) -> Problem:
    """Make the finding for a fault of a file or of the planned load."""
    return problem(fault.id, fault.message, fault.remedy)
