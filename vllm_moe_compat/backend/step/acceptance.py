"""How many drafts of a request are right, by what became of those before.

The rate of a position is that of its drafts among those whose predecessors were right. Each
request has rates of its own, in which later drafts count more than earlier ones; a new request
begins with the rates over all requests.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]

# How much a verified draft counts after the next one of that position, for one request and for
# all requests.
FADES, FADES_FOR_ALL = 0.95, 0.98
# The rate before the first draft is verified. High, since drafts were asked for.
AT_FIRST = 0.8
# For how many drafts of a request the rate over all requests counts.
WEIGHT_OF_ALL = 1.0
# For how many drafts the past counts once drafts are tried again.
WEIGHT_OF_PAST = 4.0


class Acceptance:
    """Rates of right drafts."""

    def __init__(self, most: int) -> None:
        """``most``: drafts of a request in one pass."""
        self.most = most
        # Right drafts and all of them by position, [most] over all requests, and
        # [requests or more, most] for each.
        self._right_of_all, self._of_all = np.full(most, AT_FIRST), np.ones(most)
        self._right, self._all = np.zeros((1, most)), np.zeros((1, most))
        self._row: dict[str, int] = {}
        self._free = [0]

    def add(self, req_ids: Sequence[str], drafted: Int, accepted: Int) -> None:
        """Take note that the first ``accepted[i]`` of ``drafted[i]`` drafts were right."""
        rows = self._rows(req_ids)
        positions = np.arange(self.most)
        right = positions < accepted[:, None]
        seen = positions < np.minimum(drafted, accepted + 1)[:, None]
        fades = np.where(seen, FADES, 1)
        self._right[rows] = self._right[rows] * fades + right
        self._all[rows] = self._all[rows] * fades + seen
        fades = FADES_FOR_ALL ** seen.sum(axis=0)
        self._right_of_all = self._right_of_all * fades + right.sum(axis=0)
        self._of_all = self._of_all * fades + seen.sum(axis=0)

    def expected(self, req_ids: Sequence[str]) -> Float:
        """Return how many of 0, 1, … ``most`` drafts are expected to be right.

        ``[len(req_ids), most + 1]``.
        """
        rows, of_all = self._rows(req_ids), self._right_of_all / self._of_all
        rates = (self._right[rows] + WEIGHT_OF_ALL * of_all) / (self._all[rows] + WEIGHT_OF_ALL)
        expected = np.zeros((len(rows), self.most + 1))
        np.cumsum(np.cumprod(rates, axis=1), axis=1, out=expected[:, 1:])
        return expected

    def mistrust(self, req_ids: Sequence[str], since: int) -> None:
        """Let the past of requests count for less from draft ``since`` on."""
        rows = self._rows(req_ids)
        less = WEIGHT_OF_PAST / np.maximum(self._all[rows, since:], WEIGHT_OF_PAST)
        self._right[rows, since:] *= less
        self._all[rows, since:] *= less

    @property
    def rate(self) -> float:
        """The rate of first drafts over all requests."""
        return float(self._right_of_all[0] / self._of_all[0])

    @property
    def kept(self) -> int:
        """The number of requests with rates of their own."""
        return len(self._row)

    def forget(self, req_id: str) -> None:
        """Let go of a request."""
        if req_id in self._row:
            self._free.append(self._row.pop(req_id))

    def _rows(self, req_ids: Sequence[str]) -> list[int]:
        """Return the requests' rows; new ones begin with zeros."""
        return [self._row[one] if one in self._row else self._begin(one) for one in req_ids]

    def _begin(self, req_id: str) -> int:
        if not self._free:
            size = len(self._all)
            self._right, self._all = (
                np.pad(a, ((0, size), (0, 0))) for a in (self._right, self._all)
            )
            self._free = list(range(size, 2 * size))
        row = self._row[req_id] = self._free.pop()
        self._right[row] = self._all[row] = 0
        return row
