"""Compare the index file with the shards.

mlx-lm loads ``model*.safetensors`` and never opens the index, so it is no source of names here
either. A contradiction means an incomplete download and is a fault, with one exception: uploads
in MLX form often keep the index of the release that they were converted from. Such an index is
*stale*, a warning, if all of this holds:

* the shards are in MLX form: mlx-lm's mark is in every header, or weights are packed with
  ``scales``, or experts are stacked under ``switch_mlp`` or ``switch_glu``;
* no numbered series of shards has a gap: with ``model-00001-of-00003`` there are 2 and 3;
* the shards hold every decoder layer that the index names;
* what the index names and no shard holds is not in MLX form.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from vllm_moe_compat.checkpoint.extras import Ignored
from vllm_moe_compat.checkpoint.files import (
    AGAIN,
    FileFault,
    Report,
    UnreadableError,
    read_json,
)
from vllm_moe_compat.checkpoint.headers import TensorInfo, metadata_of, weight_files
from vllm_moe_compat.checkpoint.names import fold, layer_of

INDEX = "model.safetensors.index.json"
MAX_INDEX = 128 * 2**20
"""Limit for the index, in bytes; that of 61,000 tensors has 8 million."""
STALE = "index-stale"
"""Id of the fault that is a warning."""
_STALE = f"{AGAIN}, or delete a stale index"
_SERIES = re.compile(r"(.*)-(\d{1,9})-of-(\d{1,9})\.safetensors")
_STACKED = (".switch_mlp.", ".switch_glu.")


def contradictions(
    model_dir: Path,
    index: Mapping[str, str],
    tensors: Mapping[str, TensorInfo],
    extras: Ignored,
) -> Iterator[FileFault]:
    """Yield a fault for each file of the index whose tensors the shards do not hold.

    Extra tensors may be missing, together with their files. For a stale index, one fault of the
    id ``STALE`` is yielded.
    """
    missing: dict[str, str] = {}
    for name, file in index.items():
        info = tensors.get(name)
        if info is None or info.file != file:
            missing[name] = file
    missing_from: dict[str, list[str]] = {}
    wanted = missing.keys() - extras.select(missing)
    if wanted and _is_mlx(model_dir, tensors):
        if gap := _gap(model_dir):
            yield gap
            return
        if _holds_layers(index.keys() - extras.select(index), wanted, tensors):
            yield FileFault(
                STALE,
                f"{INDEX}: it does not describe the shards here: it puts {fold(sorted(wanted))} "
                "elsewhere; the shards are complete and in MLX form, and mlx-lm reads no index",
                "delete the index",
            )
            return
    for name in wanted:
        missing_from.setdefault(missing[name], []).append(name)
    for file, names in sorted(missing_from.items()):
        yield _contradiction(model_dir, file, sorted(names))


def read_index(model_dir: Path, report: Report) -> dict[str, str] | None:
    """Return tensor → file by the index, without paths that leave the folder.

    None if there is no readable index.
    """
    path = model_dir / INDEX
    if not os.path.lexists(path):
        return None
    try:
        index, twice = read_json(path, MAX_INDEX)
    except UnreadableError as error:
        report(FileFault("index-unreadable", f"{INDEX}: not readable as JSON ({error})"))
        return None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        what = "no weight_map from tensor names to file names was found in it"
        report(FileFault("index-unreadable", f"{INDEX}: {what}"))
        return None
    if twice:
        found = f"it has {fold(twice)} twice, where each tensor was expected once"
        report(FileFault("index-duplicate", f"{INDEX}: {found}", _STALE))
    if outside := sorted({file for file in weight_map.values() if _is_outside(file)}):
        more = f" and {len(outside) - 1} more such files" if len(outside) > 1 else ""
        report(
            FileFault(
                "index-outside",
                f"{INDEX}: it names {outside[0]!r}{more}, which lies outside the checkpoint's "
                "folder, where plain file names were expected",
                "get the checkpoint from a source you trust",
            )
        )
    return {name: file for name, file in weight_map.items() if file not in outside}


def _is_mlx(model_dir: Path, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether the shards are in MLX form."""
    for name in tensors:
        if any(word in name for word in _STACKED):
            return True
        stem, _, end = name.rpartition(".")
        weight = tensors.get(f"{stem}.weight")
        if end == "scales" and weight is not None and weight.dtype == "U32":
            return True
    files = weight_files(model_dir)
    return bool(files) and all(metadata_of(file).get("format") == "mlx" for file in files)


def _gap(model_dir: Path) -> FileFault | None:
    """Return the fault of a numbered series of shards that is not complete."""
    series: dict[tuple[str, str], dict[int, str]] = {}
    for path in weight_files(model_dir):
        if match := _SERIES.fullmatch(path.name):
            series.setdefault((match[1], match[3]), {})[int(match[2])] = path.name
    for (stem, total), present in series.items():
        absent = next((n for n in range(1, int(total) + 1) if n not in present), None)
        if absent is not None:
            width = len(_SERIES.fullmatch(next(iter(present.values())))[2])  # type: ignore[index]
            return FileFault(
                "index-missing-file",
                f"{stem}-{absent:0{width}}-of-{total}.safetensors: no such file is there, expected "
                f"it beside {next(iter(present.values()))}",
            )
    return None


def _holds_layers(
    indexed: Collection[str], missing: Collection[str], tensors: Mapping[str, TensorInfo]
) -> bool:
    """Whether the shards have each layer of the index, which has no further MLX tensors."""
    nowhere = [name for name in missing if name not in tensors]
    if any(name.endswith(".scales") or any(w in name for w in _STACKED) for name in nowhere):
        return False
    here = {layer.number for name in tensors if (layer := layer_of(name))}
    return {layer.number for name in indexed if (layer := layer_of(name))} <= here


def _is_outside(file: str) -> bool:
    parts = file.replace("\\", "/").split("/")
    return not file or ".." in parts or parts[0] == "" or ":" in parts[0] or "\0" in file


def _contradiction(model_dir: Path, file: str, names: list[str]) -> FileFault:
    where = f"{INDEX}: it puts {fold(names)} in {file!r}, "
    if not os.path.exists(model_dir / file):  # not Path's: it raises where a name is too long
        return FileFault("index-missing-file", f"{where}but no such file is there", _STALE)
    if model_dir / file not in weight_files(model_dir):
        return FileFault(
            "index-other-file",
            f"{where}which mlx-lm will not load, since it takes only model*.safetensors in the "
            "folder itself",
            "rename the file and its entries in the index",
        )
    return FileFault("index-missing-tensor", f"{where}but that file does not hold them", _STALE)
