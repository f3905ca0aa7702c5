"""Read config, headers and index of a checkpoint, with a finding for each fault."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from vllm_moe_compat.checkpoint.adapters import adapter_alone
from vllm_moe_compat.checkpoint.config_file import CONFIG, MAX_CONFIG, read_object
from vllm_moe_compat.checkpoint.files import FileFault, UnreadableError, read_json
from vllm_moe_compat.checkpoint.headers import TensorInfo, scan_headers, weight_files
from vllm_moe_compat.checkpoint.index import INDEX, read_index
from vllm_moe_compat.checkpoint.links import outside_target
from vllm_moe_compat.checkpoint.names import fold
from vllm_moe_compat.commands.inspect.model import Problem
from vllm_moe_compat.commands.inspect.problems import of_fault, problem
from vllm_moe_compat.commands.locate import Location


@dataclass(slots=True)
class Contents:
    """The contents of a checkpoint, and the findings so far.

    Attributes:
        location: the checkpoint.
        config: its config.json; None where it is missing or unreadable.
        extern: the content of its hf_quant_config.json.
        tensors: every tensor.
        shards: number of files.
        index: name → file, by the index; None where it is missing or unreadable.
        problems: the findings so far, in the order of discovery.
    """

    location: Location
    config: dict[str, Any] | None = None
    extern: Any = None
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    shards: int = 0
    index: dict[str, str] | None = None
    problems: list[Problem] = field(default_factory=list)

    def add(self, id: str, message: object, remedy: str = "") -> None:
        """Add a finding."""
        self.problems.append(problem(id, message, remedy))

    def fault(self, fault: FileFault) -> None:
        """Add the finding for a faulty file."""
        self.problems.append(of_fault(fault))


def read(location: Location) -> Contents:
    """Read config, headers and index; unreadable parts become findings."""
    shards = weight_files(location.folder)
    if location.shard is not None and [os.fspath(s) for s in shards] == [os.fspath(location.shard)]:
        location = Location(location.folder, None, location.repository)
    contents = Contents(location)
    _read_config(contents)
    if location.shard is not None:
        shards = [location.shard]
        contents.add("single-file", f"only {location.shard.name} is described; no load is planned")
    elif not shards and (alone := adapter_alone(location.folder)) is not None:
        contents.fault(alone)
    elif not shards:
        others = sorted(p.name for p in location.folder.glob("*.safetensors"))[:3]
        found = f"found {', '.join(others)}" if others else "no file of that name"
        contents.add(
            "no-weights",
            f"model*.safetensors was expected, {found}",
            "rename the files, or download the safetensors form of the checkpoint",
        )
    contents.shards = len(shards)
    for path in shards:
        if path.is_symlink() and (target := outside_target(path, location.folder)) is not None:
            contents.add(
                "link-outside",
                f"{path.name} is a link to {target}, outside the folder",
                "nothing has to be done if you put it there",
            )
    contents.tensors = scan_headers(shards, contents.fault)
    if location.shard is None and shards:
        _read_index(contents)
    return contents


def _read_config(contents: Contents) -> None:
    path = contents.location.folder / CONFIG
    single = contents.location.shard is not None
    if not os.path.lexists(path):
        if not single:
            contents.add("config-missing", "there is no config.json", "download it too")
        return
    try:
        contents.config = read_object(path)
    except UnreadableError as error:
        contents.add("config-unreadable", f"config.json: {error}", "download the config again")
        return
    extern = contents.location.folder / "hf_quant_config.json"
    if os.path.lexists(extern):
        try:
            contents.extern, _ = read_json(extern, MAX_CONFIG)
        except UnreadableError as error:
            contents.add("config-unreadable", f"{extern.name}: {error}", "download it again")


def _read_index(contents: Contents) -> None:
    contents.index = read_index(contents.location.folder, contents.fault)
    if contents.index and (unnamed := contents.tensors.keys() - contents.index.keys()):
        contents.add(
            "index-extra",
            f"{INDEX} does not name {fold(sorted(unnamed))}, which the shards hold",
            "remove shards that are not part of the checkpoint: mlx-lm loads them all",
        )
