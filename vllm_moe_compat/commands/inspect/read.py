"""Read config, headers and index of a checkpoint, with a finding for each fault."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from vllm_moe_compat.checkpoint.config_file import CONFIG, MAX_CONFIG, read_object
from vllm_moe_compat.checkpoint.files import FileFault, UnreadableError, read_json
from vllm_moe_compat.checkpoint.headers import TensorInfo, scan_headers, weight_files
from vllm_moe_compat.checkpoint.index import INDEX, read_index
from vllm_moe_compat.checkpoint.links import outside_target
from vllm_moe_compat.checkpoint.names import fold
from vllm_moe_compat.commands.inspect.locate import Place
from vllm_moe_compat.commands.inspect.model import Problem
from vllm_moe_compat.commands.inspect.problems import of_fault, problem


@dataclass(slots=True)
class Given:
    """The contents of a checkpoint, and the findings so far.

    Attributes:
        place: the checkpoint.
        config: its config.json; None where it is missing or unreadable.
        extern: the content of its hf_quant_config.json.
        tensors: every tensor.
        shards: number of files.
        index: name → file, by the index; None where it is missing or unreadable.
        problems: the findings so far, in the order of discovery.
    """

    place: Place
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


def read(place: Place) -> Given:
    """Read config, headers and index; unreadable parts become findings."""
    shards = weight_files(place.folder)
    if place.shard is not None and [os.fspath(s) for s in shards] == [os.fspath(place.shard)]:
        place = Place(place.folder, None, place.repository)
    given = Given(place)
    _read_config(given)
    if place.shard is not None:
        shards = [place.shard]
        given.add("single-file", f"only {place.shard.name} is described; no load is planned")
    elif not shards:
        others = sorted(p.name for p in place.folder.glob("*.safetensors"))[:3]
        found = f"found {', '.join(others)}" if others else "no file of that name"
        given.add(
            "no-weights",
            f"model*.safetensors was expected, {found}",
            "rename the files, or download the safetensors form of the checkpoint",
        )
    given.shards = len(shards)
    for path in shards:
        if path.is_symlink() and (target := outside_target(path, place.folder)) is not None:
            given.add(
                "link-outside",
                f"{path.name} is a link to {target}, outside the folder",
                "nothing has to be done if you put it there",
            )
    given.tensors = scan_headers(shards, given.fault)
    if place.shard is None and shards:
        _read_index(given)
    return given


def _read_config(given: Given) -> None:
    path = given.place.folder / CONFIG
    single = given.place.shard is not None
    if not os.path.lexists(path):
        if not single:
            given.add("config-missing", "there is no config.json", "download it too")
        return
    try:
        given.config = read_object(path)
    except UnreadableError as error:
        given.add("config-unreadable", f"config.json: {error}", "download the config again")
        return
    extern = given.place.folder / "hf_quant_config.json"
    if os.path.lexists(extern):
        try:
            given.extern, _ = read_json(extern, MAX_CONFIG)
        except UnreadableError as error:
            given.add("config-unreadable", f"{extern.name}: {error}", "download it again")


def _read_index(given: Given) -> None:
    given.index = read_index(given.place.folder, given.fault)
    if given.index and (unnamed := given.tensors.keys() - given.index.keys()):
        given.add(
            "index-extra",
            f"{INDEX} does not name {fold(sorted(unnamed))}, which the shards hold",
            "remove shards that are not part of the checkpoint: mlx-lm loads them all",
        )
