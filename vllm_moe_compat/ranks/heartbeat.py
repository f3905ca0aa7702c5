"""Each rank notices within seconds that another one is dead, stopped, unreachable or hangs.

MLX's collectives wait for all ranks, and for ever: when a rank is killed, the others stay in the
evaluation that needs it, where Python cannot interrupt them. So a thread of each rank, which MLX
lets run, watches the others over TCP. Rank 0 listens, the others connect, and each sends a line a
second:

    beat PLACES   it lives, and has come to so many places where it waits for the others
    bye           it ends in good order
    lost REASON   rank 0 has lost a rank, and tells the others why they end

A rank is lost if its connection closes without a ``bye``, if it says nothing for ``SILENCE``
seconds, or if it comes to no new place for ``STALL`` seconds while another rank waits there. Rank 0
then logs one sentence with its name, and every rank ends its process: the state of a step that
only some ranks computed is of no use.
"""

from __future__ import annotations

import hmac
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from vllm_moe_compat.errors import UnsupportedServingError
from vllm_moe_compat.log import logger
from vllm_moe_compat.ranks.connect import Exchange, Place

BEAT = 1.0
"""Seconds between two lines."""
SILENCE = 60.0
"""Seconds without a line after which a rank counts as lost; a busy machine may delay a thread."""
STALL = 120.0
"""Seconds without progress after which a rank that others wait for counts as lost."""
CONNECT = 60.0
"""Seconds for the other ranks to connect to rank 0."""
GRACE = 3.0
"""Seconds between the sentence about a lost rank and the end of the process, for an orderly end."""


NOTICE = 2.0
"""Seconds to notice a lost rank after MLX raised an error."""


class LostRankError(RuntimeError):
    """Another rank is dead, stopped, unreachable or hangs."""


@dataclass(slots=True)
class _Peer:
    """What is known of another rank."""

    rank: int
    name: str
    connection: socket.socket
    heard: float
    places: int = 0
    progressed: float = 0.0
    rest: bytes = b""
    gone: bool = False


def _end_process() -> None:
    time.sleep(GRACE)
    os._exit(1)


class Heartbeat:
    """Watches the other ranks from a thread, from ``start`` to ``close``."""

    def __init__(
        self,
        place: Place,
        exchange: Exchange,
        *,
        silence: float = SILENCE,
        stall: float = STALL,
        end: Callable[[], None] = _end_process,
    ) -> None:
        """Connect the ranks; all of them call it.

        Args:
            place: of this rank.
            exchange: tells the others an address and a secret.
            silence: as ``SILENCE``.
            stall: as ``STALL``.
            end: called in the thread after a rank was lost; it should end the process.

        Raises:
            UnsupportedServingError: a rank cannot be reached within ``CONNECT`` seconds.
        """
        self._place, self._silence, self._stall, self._end = place, silence, stall, end
        self._names = exchange(f"rank {place.rank} (process {os.getpid()} on {place.host})")
        self._selector = selectors.DefaultSelector()
        self._places = 0
        self._closing, self._lost = threading.Event(), threading.Event()
        self._reason = ""
        if place.rank == 0:
            self._peers = self._accept(exchange)
        else:
            address, secret = exchange(None)[0]
            self._peers = [self._call(address, secret)]
        for peer in self._peers:
            peer.connection.settimeout(1.0)
            self._selector.register(peer.connection, selectors.EVENT_READ, peer)
        self._thread = threading.Thread(target=self._watch, name="moe-compat-ranks", daemon=True)
        self._thread.start()

    def progress(self) -> None:
        """Note that this rank has come to the next place where it may wait for the others."""
        self._places += 1

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Name the lost rank where MLX raises an error of its own: it says that a peer is lost.

        Raises:
            LostRankError: in place of an error of MLX, if a rank is lost now or soon.
        """
        try:
            yield
        except RuntimeError as error:
            if self._lost.wait(NOTICE):
                raise LostRankError(self._reason) from error
            raise

    def close(self) -> None:
        """Tell the others that this rank ends in good order, and stop watching; idempotent."""
        self._closing.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # --- connecting -----------------------------------------------------------

    def _accept(self, exchange: Exchange) -> list[_Peer]:
        secret = secrets.token_hex(16)
        family, kind, protocol, _, address = socket.getaddrinfo(
            self._place.host, 0, type=socket.SOCK_STREAM
        )[0]
        found: dict[int, _Peer] = {}
        with socket.socket(family, kind, protocol) as listener:
            listener.bind(address)
            listener.listen(self._place.size)
            exchange((listener.getsockname()[:2], secret))
            deadline = time.monotonic() + CONNECT
            while len(found) < self._place.size - 1:
                listener.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    missing = [
                        name for rank, name in enumerate(self._names) if rank and rank not in found
                    ]
                    raise UnsupportedServingError(
                        f"{', '.join(missing)}: no connection to {self._names[0]} within "
                        f"{CONNECT:.0f} seconds; check that VLLM_HOST_IP is an address that the "
                        "other machines reach, and that no firewall is in between."
                    ) from None
                rank = _introduction(connection, secret)
                if rank is None:  # A stranger.
                    connection.close()
                    continue
                found[rank] = _Peer(rank, self._names[rank], connection, time.monotonic())
        return list(found.values())

    def _call(self, address: tuple[str, int], secret: str) -> _Peer:
        try:
            connection = socket.create_connection(address, timeout=CONNECT)
            connection.sendall(f"{secret} {self._place.rank}\n".encode())
        except OSError as error:
            raise UnsupportedServingError(
                f"{self._names[0]} cannot be reached from {self._names[self._place.rank]}: "
                f"{error}; check that VLLM_HOST_IP is an address that the other machines reach, "
                "and that no firewall is in between."
            ) from error
        return _Peer(0, self._names[0], connection, time.monotonic())

    # --- watching -------------------------------------------------------------

    def _watch(self) -> None:
        spoken = 0.0
        while True:
            closing = self._closing.is_set()
            now = time.monotonic()
            if closing or now - spoken >= BEAT:
                self._say("bye" if closing else f"beat {self._places}")
                spoken = now
            if closing:
                break
            reason = self._listen() or self._judge()
            if reason:
                self._lose(reason)
                break
        for peer in self._peers:
            peer.connection.close()
        self._selector.close()

    def _say(self, line: str) -> None:
        for peer in self._peers:
            if peer.gone:
                continue
            try:
                peer.connection.sendall(f"{line}\n".encode())
            except OSError:
                # Whether it is lost is decided by what comes from it.
                logger.debug("%s does not take a line", peer.name)

    def _listen(self) -> str:
        """Read what the others said for up to a fraction of a beat; return a reason to end."""
        for key, _ in self._selector.select(timeout=BEAT / 4):
            peer: _Peer = key.data
            try:
                data = peer.connection.recv(4096)
            except TimeoutError:
                continue
            except OSError:
                data = b""
            *lines, peer.rest = (peer.rest + data).split(b"\n")
            peer.heard = time.monotonic()
            for line in lines:
                word, _, value = line.decode(errors="replace").partition(" ")
                if word == "beat":
                    if int(value) > peer.places:
                        peer.places, peer.progressed = int(value), peer.heard
                elif word == "bye":
                    peer.gone = True
                elif word == "lost":
                    return f"={value}"
            if not data:
                self._selector.unregister(peer.connection)
                if not peer.gone:
                    return f"{peer.name} has ended"
        return ""

    def _judge(self) -> str:
        """Return a sentence about a rank that is silent, or hangs; empty if there is none."""
        now = time.monotonic()
        for peer in self._peers:
            if peer.gone:
                continue
            if now - peer.heard > self._silence:
                return (
                    f"{peer.name} has said nothing for {self._silence:.0f} seconds: it is stopped, "
                    "its machine swaps, or cannot be reached"
                )
            if peer.places >= self._places:
                peer.progressed = now
            elif now - peer.progressed > self._stall:
                return f"{peer.name} has hung for {self._stall:.0f} seconds"
        return ""

    def _lose(self, reason: str) -> None:
        self._reason = reason.removeprefix("=")
        self._lost.set()
        if reason.startswith("="):  # Rank 0 has logged it.
            logger.info("rank %d ends, since %s", self._place.rank, self._reason)
        else:
            logger.error("%s: the engine ends, since no rank can go on without it", reason)
            if self._place.rank == 0:
                self._say(f"lost {reason}")
        self._end()


def _introduction(connection: socket.socket, secret: str) -> int | None:
    """Return the rank that a new connection says it is; None if it does not know the secret."""
    connection.settimeout(5.0)
    line = b""
    try:
        while not line.endswith(b"\n") and len(line) < 100:
            part = connection.recv(1)
            if not part:
                return None
            line += part
    except OSError:
        return None
    known, _, rank = line.decode(errors="replace").strip().partition(" ")
    return int(rank) if hmac.compare_digest(known, secret) and rank.isdecimal() else None
