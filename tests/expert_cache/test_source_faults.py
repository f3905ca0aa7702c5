"""Files that change while experts are read from them."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from support.stored import write
from vllm_moe_compat.checkpoint import file_stamps
from vllm_moe_compat.checkpoint.headers import TensorInfo, read_headers
from vllm_moe_compat.checkpoint.numbers.fp8_ops import DequantizeFp8
from vllm_moe_compat.errors import CheckpointFileError, LayoutError
from vllm_moe_compat.execute.quantize import PackedBuild
from vllm_moe_compat.execute.stored_tensors import StoredTensors
from vllm_moe_compat.expert_cache.protocol import Spec
from vllm_moe_compat.expert_cache.source import FileSource
from vllm_moe_compat.plan.build import Build
from vllm_moe_compat.plan.ops import StackExperts

E, ROWS, COLUMNS = 4, 8, 32
PATH = "layers.3.switch_mlp"
FILES = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def an_array(dtype: mx.Dtype = mx.uint8) -> mx.array:
    return mx.random.randint(0, 100, (ROWS, COLUMNS)).astype(dtype)


def checkpoint(folder: Path, *, fp8: bool, before: Callable[[], None] = lambda: None) -> FileSource:
    """Experts 0 and 1 in the first file, 2 and 3 in the second, the last one at its end."""
    for number, file in enumerate(FILES):
        arrays, tensors = {}, {}
        for e in (2 * number, 2 * number + 1):
            arrays[f"e{e}.up"] = an_array(mx.uint8 if fp8 else mx.float32)
            tensors[f"e{e}.up"] = TensorInfo("F8_E4M3" if fp8 else "F32", (ROWS, COLUMNS))
            arrays[f"e{e}.scale"] = mx.full((1, 2), 0.5)
            tensors[f"e{e}.scale"] = TensorInfo("F32", (1, 2))
        write(folder, arrays, tensors, file)
        age(folder / file)
    build = Build(
        f"{PATH}.up_proj.weight",
        tuple(f"e{e}.up" for e in range(E)),
        (("scale", tuple(f"e{e}.scale" for e in range(E))),) if fp8 else (),
        (StackExperts(E), DequantizeFp8((8, 16))) if fp8 else (StackExperts(E),),
    )
    stamps = file_stamps.take(folder)
    files = StoredTensors(folder, read_headers(folder), stamps=stamps)
    before()
    packed = PackedBuild(build, build.targets, (None,), "float32")
    return FileSource(files, PATH, [packed], {"up_proj.weight": Spec((ROWS, COLUMNS), mx.float32)})


def age(path: Path) -> None:
    """Make the file an hour older, so that a change within a clock's tick shows."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns - 3600 * 10**9))


class Slots:
    """What ``read`` writes into."""

    def __init__(self) -> None:
        self.bytes = {e: np.zeros(4 * ROWS * COLUMNS, np.uint8) for e in range(E)}

    def __call__(self, expert: int) -> dict[str, Any]:
        return {"up_proj.weight": self.bytes[expert]}


def same_again(path: Path) -> None:
    path.write_bytes(path.read_bytes())


def replace(path: Path) -> None:
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    status = path.stat()
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    copy.replace(path)


def other_values(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "other values": (other_values, "when it was loaded there was .* and now there is .* bytes"),
    "written again": (same_again, "when it was loaded there was"),
    "replaced by a copy": (replace, "and now there is .* in another file; put the file back"),
    "removed": (Path.unlink, "and now there is none; put the file back"),
    "shortened": (shorten, "ends after|and now there is"),
    "emptied": (lambda path: os.truncate(path, 0), "ends after 0 bytes"),
}


@pytest.mark.parametrize("fp8", [False, True], ids=["plain", "fp8"])
@pytest.mark.parametrize("change", CHANGES)
def test_experts_of_a_file_that_changed_have_failed_and_others_not(
    tmp_path: Path, change: str, fp8: bool
):
    changed, message = CHANGES[change]
    found = checkpoint(tmp_path, fp8=fp8)
    before, after = Slots(), Slots()
    assert found.read(range(E), before) == {}
    changed(tmp_path / FILES[1])
    failed = found.read(range(E), after)
    assert sorted(failed) == [2, 3]
    for expert, error in failed.items():
        assert type(error) is CheckpointFileError
        assert str(error).startswith(f"expert {expert} of {PATH}: {FILES[1]}: ")
    with pytest.raises(CheckpointFileError, match=message):
        raise failed[3]
    for expert in (0, 1):
        assert np.array_equal(after.bytes[expert], before.bytes[expert])


def test_a_file_that_is_put_back_is_read_again(tmp_path: Path):
    found = checkpoint(tmp_path, fp8=False)
    assert found.read([2], Slots()) == {}
    path = tmp_path / FILES[1]
    path.rename(tmp_path / "away")
    assert sorted(found.read([0, 2], Slots())) == [2]
    (tmp_path / "away").rename(path)
    assert found.read([0, 2], Slots()) == {}


@pytest.mark.parametrize("change", ["other values", "written again", "removed", "shortened"])
def test_a_file_that_is_not_the_described_one_ends_the_load(tmp_path: Path, change: str):
    changed, _ = CHANGES[change]
    with pytest.raises(
        CheckpointFileError, match=f"{FILES[1]}: .*(was expected|put the file back)"
    ):
        checkpoint(tmp_path, fp8=True, before=lambda: changed(tmp_path / FILES[1]))


@pytest.mark.parametrize("hold", [False, True])
def test_an_expert_that_contradicts_its_plan_has_failed_by_name(tmp_path: Path, hold: bool):
    """Values that the plan checks when it makes a tensor are checked for each expert."""
    from support.packed import pack_form
    from vllm_moe_compat.checkpoint.numbers import find_numbers
    from vllm_moe_compat.execute.run_plan import tensor_infos

    form, generator = pack_form(4, 32), np.random.default_rng(0)
    names = [f"e{e}.up.weight" for e in range(E)]
    state = {}
    for name in names:
        state |= form.store(name, form.draw(generator, ROWS, COLUMNS))
    arrays = {name: mx.array(value.numpy()) for name, value in state.items()}
    arrays["e2.up.weight_shape"] = mx.array([ROWS, COLUMNS + 1], dtype=mx.int64)
    infos = tensor_infos(arrays)
    write(tmp_path, arrays, infos)
    numbers = find_numbers(infos, {"quantization_config": form.config})
    each = [numbers.stored(name) for name in names]
    op = numbers.dequantize(names[0])
    assert op is not None
    parts = tuple((r, tuple(dict(one.parts)[r] for one in each)) for r, _ in each[0].parts)
    target = f"{PATH}.up_proj.weight"
    build = Build(target, tuple(o.tensor for o in each), parts, (StackExperts(E), op))
    files = StoredTensors(tmp_path, read_headers(tmp_path))
    packed = PackedBuild(build, build.targets, (op.held if hold else None,), "float32")
    specs = {"up_proj.weight": Spec((ROWS, COLUMNS), mx.float32)}
    if hold:
        kinds = {"weight": (4, mx.uint32), "scales": (1, mx.float16), "biases": (1, mx.float16)}
        specs = {f"up_proj.{k}": Spec((ROWS, n), dtype) for k, (n, dtype) in kinds.items()}
    slots = {n: np.empty(ROWS * s.shape[1] * s.dtype.size, np.uint8) for n, s in specs.items()}
    failed = FileSource(files, PATH, [packed], specs).read(range(E), lambda _: slots)
    assert list(failed) == [2]
    message = rf"expert 2 of {PATH}: model\.safetensors: .*weight_shape (of|is) \[8, 33\]"
    with pytest.raises(LayoutError, match=message):
        raise failed[2]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_reads_with_threads_of_its_own(tmp_path: Path):
    found = checkpoint(tmp_path, fp8=False)
    assert found.read([0], Slots()) == {}
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(write, b"%d" % len(found.read([1], Slots())))
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as answers:
        ready, _, _ = select.select([answers], [], [], 60)
        answer = answers.read() if ready else b"no answer"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert answer == b"0"
