"""What one engine will still take is not free for another."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap

import pytest

from vllm_moe_compat.load import claims
from vllm_moe_compat.load.memory import host_memory

SIZE = 3 << 30
SCRIPT = """
    import sys
    from vllm_moe_compat.load import claims
    import mmap, ctypes
    memory = mmap.mmap(-1, int(sys.argv[1]), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    release = claims.claim(address, len(memory))
    print("claimed", flush=True)
    for line in sys.stdin:
        if line.startswith("touch"):
            memory[: 256 << 20] = bytes(256 << 20)
        else:
            release()
        print("done", flush=True)
"""


@pytest.fixture
def other():
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(SIZE)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "claimed\n"
        yield child
        child.kill()


def tell(child: subprocess.Popen[str], what: str) -> None:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(what + "\n")
    child.stdin.flush()
    assert child.stdout.readline() == "done\n"


def of(child: subprocess.Popen[str]) -> int:
    return claims._of_other(claims.folder() / str(child.pid))


def test_a_claim_of_another_process_is_not_free(other: subprocess.Popen[str]) -> None:
    assert of(other) > SIZE - (64 << 20)
    _, free = host_memory()
    assert claims.outstanding() >= of(other)
    tell(other, "touch")
    # What was touched is counted by the system itself, and no longer claimed.
    assert SIZE - (512 << 20) < of(other) < SIZE - (192 << 20)
    tell(other, "release")
    assert of(other) == 0
    assert host_memory()[1] > free + (1 << 30)


def test_a_claim_ends_with_its_process(other: subprocess.Popen[str]) -> None:
    file = claims.folder() / str(other.pid)
    assert file.exists()
    other.kill()
    other.wait()
    claims.outstanding()
    assert not file.exists()


def test_a_folder_that_cannot_be_written_is_said(
    tmp_path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setattr(claims.tempfile, "gettempdir", lambda: str(blocked))
    monkeypatch.setattr(logging.getLogger("vllm_moe_compat"), "propagate", True)
    claims.claim(0, 1 << 20)()
    assert "other engines on this machine do not see" in caplog.text


def test_nothing_is_written_into_a_folder_of_another_user(
    tmp_path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("kept")
    monkeypatch.setattr(claims.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(claims.os, "getuid", lambda: 12345)
    claims.folder().mkdir(parents=True)  # made by the user that runs the tests
    (claims.folder() / f".{os.getpid()}").symlink_to(victim)
    monkeypatch.setattr(logging.getLogger("vllm_moe_compat"), "propagate", True)
    claims.claim(0, 1 << 20)()
    assert "belongs to another user" in caplog.text
    assert victim.read_text() == "kept"
