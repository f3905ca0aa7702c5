"""Drafts are given where they pay, by the costs and the acceptance of simulated machines.

Time passes only as the simulation says, so nothing here depends on the machine.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pytest

from vllm_moe_compat.backend.step.batch import Request
from vllm_moe_compat.backend.step.parking import Parking
from vllm_moe_compat.backend.step.pass_costs import PassCosts

MOST = 4


def make_requests(rows: int, name: str = "r") -> list[Request]:
    return [Request(f"{name}{i}", [1], None, [], 0) for i in range(rows)]


@dataclass
class Machine:
    """A machine with parking.

    Attributes:
        slope: what each further token of a row adds to a pass, as a share of the first; a
            function of the number of rows.
        noise: standard deviation of the seconds, relative.
        outliers: share of the passes that take ten times as long, by another's doing.
    """

    slope: Callable[[int], float]
    noise: float = 0.05
    outliers: float = 0.01
    parking: Parking = field(default_factory=lambda: Parking(MOST))
    draw: random.Random = field(default_factory=lambda: random.Random(0))
    verified: int = 0  # passes with drafts

    def cost(self, rows: int, width: int) -> float:
        return 1 + self.slope(rows) * (width - 1)

    def serve(
        self,
        requests: list[Request],
        rate: Callable[[Request], float],
        steps: int,
        offered: float = 1.0,
    ) -> float:
        """Serve some steps; return the speed relative to no drafts.

        Args:
            requests: of the batch.
            rate: of right drafts of a request.
            steps: to serve.
            offered: share of the steps in which the drafter finds drafts for a request.
        """
        tokens, seconds, rows = 0, 0.0, len(requests)
        drafted = [0] * rows
        self.verified = 0
        for _ in range(steps):
            accepted = []
            for request, count in zip(requests, drafted, strict=True):
                wrong = (n for n in range(count) if self.draw.random() >= rate(request))
                accepted.append(next(wrong, count))
            width = 1 + max(drafted)
            self.verified += width > 1
            cost = self.cost(rows, width)
            tokens, seconds = tokens + rows + sum(accepted), seconds + cost
            measured = cost * max(0.1, self.draw.gauss(1, self.noise))
            measured *= 10 if self.draw.random() < self.outliers else 1
            self.parking.observe(requests, drafted, accepted, measured)
            wanted = self.parking.lengths(requests)
            proposed = [n if self.draw.random() < offered else 0 for n in wanted]
            drafted = self.parking.kept(requests, proposed)
            assert all(0 <= n <= limit for n, limit in zip(drafted, proposed, strict=True))
        return tokens / seconds / (rows / self.cost(rows, 1))


def best_speed(slope: float, rate: float) -> float:
    """The speed with the best fixed number of drafts, none included."""
    expected = [sum(rate**j for j in range(count + 1)) for count in range(MOST + 1)]
    return max(one / (1 + slope * count) for count, one in enumerate(expected))


@pytest.mark.parametrize("slope", [0.05, 0.25, 1.0])
@pytest.mark.parametrize("rate", [0.0, 0.5, 0.8, 1.0])
def test_the_speed_is_near_the_best_one_and_never_below_that_without_drafts_for_long(
    slope: float, rate: float
) -> None:
    machine = Machine(lambda rows: slope)
    speed = machine.serve(make_requests(1), lambda request: rate, 800)
    assert speed > 0.98
    best = best_speed(slope, rate)
    assert speed > 0.9 * best or best < 1.3  # Chance decides where there is little to gain.


def test_a_short_time_of_learning_costs_little() -> None:
    for slope in (0.25, 1.0):
        assert Machine(lambda rows, s=slope: s).serve(make_requests(1), lambda _: 0.0, 150) > 0.9


def test_drafts_come_back_when_the_text_changes_and_go_again() -> None:
    machine, requests = Machine(lambda rows: 0.25), make_requests(1)
    assert machine.serve(requests, lambda _: 0.0, 600) > 0.97
    assert machine.verified < 30
    assert machine.serve(requests, lambda _: 0.9, 900) > 0.75 * best_speed(0.25, 0.9)
    machine.serve(requests, lambda _: 0.0, 60)
    assert machine.serve(requests, lambda _: 0.0, 600) > 0.97


def test_drafts_are_parked_by_the_size_of_the_batch() -> None:
    """One row has spare bandwidth, and sixteen rows are bound by what they compute."""
    machine = Machine(lambda rows: 0.1 if rows < 4 else 1.0)
    for _ in range(3):
        for rows, least, most in ((1, 1.8, 9), (16, 0.97, 1.01), (2, 1.8, 9)):
            machine.serve(make_requests(rows), lambda _: 0.7, 60)
            speed = machine.serve(make_requests(rows), lambda _: 0.7, 400)
            assert least < speed < most, rows


def test_a_request_whose_drafts_are_wrong_is_parked_and_the_others_are_not() -> None:
    machine = Machine(lambda rows: 0.3)
    right, wrong = make_requests(1, "right"), make_requests(1, "wrong")
    speeds: dict[str, list[float]] = {"right": [], "wrong": []}
    for _ in range(10):  # They take turns.
        for name, requests, rate in (("right", right, 0.9), ("wrong", wrong, 0.05)):
            speeds[name].append(machine.serve(requests, lambda _, rate=rate: rate, 60))
    assert min(speeds["right"][2:]) > 1.3
    assert sum(speeds["wrong"]) / 10 > 0.96


def test_one_row_with_drafts_has_to_pay_for_the_width_of_all() -> None:
    machine, requests = Machine(lambda rows: 0.3), make_requests(8)
    assert machine.serve(requests, lambda _: 0.9, 800, offered=0.03) > 0.98
    assert machine.verified < 60
    assert machine.serve(requests, lambda _: 0.9, 800, offered=0.9) > 1.4


def test_nothing_proposed_costs_nothing() -> None:
    machine = Machine(lambda rows: 0.5)
    assert machine.serve(make_requests(3), lambda _: 0.9, 100, offered=0.0) == 1
    assert machine.verified == 0


def test_passes_of_one_token_are_measured_first_and_again() -> None:
    parking, (request,) = Parking(MOST), make_requests(1)
    given = []
    for _ in range(200):
        lengths = parking.lengths([request])
        given.append(lengths[0])
        parking.observe([request], lengths, lengths, 1.0)
    assert given[:2] == [0, 0]
    assert 4 <= given[2:].count(0) <= 10


def test_a_step_with_a_prompt_counts_for_acceptance_and_not_for_cost() -> None:
    parking, (request,) = Parking(MOST), make_requests(1)
    for _ in range(20):
        parking.observe([request], [MOST], [0], None)
    assert parking.acceptance.rate < 0.2
    assert parking.costs.needs_one_token(1)
    assert parking.lengths([request]) == [0]


def test_measurements_far_off_are_taken_for_outliers_until_they_are_the_rule() -> None:
    costs = PassCosts()
    for seconds in (30.0, 1.0, 1.1, 0.95, 1.05, 9.0, 8.0, 1.0):  # The first one compiles.
        costs.add(2, 1, seconds)
        costs.add(2, 3, 2 * seconds)
    assert costs.seconds_of_one_token(2) == pytest.approx(1.0, abs=0.15)
    assert costs.relative(2, [1, 2, 3, 5]) == pytest.approx([1, 1.5, 2, 3], rel=0.1)
    assert not costs.needs_one_token(2)
    costs.add(2, 1, 9.0)
    assert costs.needs_one_token(2)  # To see which it is.
    costs.add(2, 1, 8.0)
    costs.add(2, 1, 8.5)
    assert costs.seconds_of_one_token(2) == pytest.approx(8.5, abs=0.6)


def said(records: Iterable[logging.LogRecord]) -> list[str]:
    return [r.getMessage() for r in records if "are parked" in r.getMessage()]


def test_the_log_says_once_why_drafts_are_parked(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    machine = Machine(lambda rows: 0.5 if rows < 8 else 1.5, outliers=0)
    for name in "abcdef":
        machine.serve(make_requests(1, name), lambda _: 0.1, 60)
    (one,) = said(caplog.records)
    assert "too few are right: verifying 4 per request takes" in one
    machine = Machine(lambda rows: 0.5 if rows < 8 else 1.5, outliers=0)
    for name in "abcdef":
        machine.serve(make_requests(8, name), lambda _: 0.9, 60)
    _, two = said(caplog.records)
    assert "parked for batches of 8 requests: verifying" in two


def test_what_is_kept_of_requests_is_let_go() -> None:
    machine = Machine(lambda rows: 0.1)
    for number in range(40):
        requests = make_requests(5, f"n{number}-")
        machine.serve(requests, lambda _: 0.5, 10)
        for request in requests:
            machine.parking.forget(request.req_id)
    assert machine.parking.acceptance.kept == 0
    # An id that begins again begins with what holds for all.
    expected = machine.parking.acceptance.expected(["n3-1", "new"])
    assert (expected[0] == expected[1]).all()
