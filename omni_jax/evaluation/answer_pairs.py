"""Which of several answers become a preference pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from omni_jax.checks import check_float

Reason = Literal["all answers are bad", "the answers are alike", "the lengths differ too much"]


@dataclass(frozen=True)
class PairLimits:
    """What may be a pair."""

    bad_below: float = -0.5
    """Reward under which an answer is bad; one that is bad is never the better one."""
    least_gap: float = 0.05
    """By how much the rewards of a pair differ at least."""
    max_length_gap: float = 0.5
    """How many more codes the longer answer may have, as a share of the shorter one's."""

    def check(self) -> None:
        """Raises InputError for a value out of range."""
        check_float("--pairs.bad-below", self.bad_below, -100, 0)
        check_float("--pairs.least-gap", self.least_gap, 0, 100)
        check_float("--pairs.max-length-gap", self.max_length_gap, 0, 100)


class ScoredAnswer(NamedTuple):
    """Codes, and what they are worth."""

    codes: tuple[int, ...]
    reward: float


class Pair(NamedTuple):
    """Places of two answers among those that were given."""

    chosen: int
    rejected: int


def choose_pair(answers: Sequence[ScoredAnswer], limits: PairLimits) -> Pair | Reason:
    """The two whose rewards differ most of those that may be a pair; or why there are none."""
    if all(answer.reward < limits.bad_below for answer in answers):
        return "all answers are bad"
    best: Pair | None = None
    best_gap = 0.0
    has_gap = False
    for first, chosen in enumerate(answers):
        for second, rejected in enumerate(answers):
            gap = chosen.reward - rejected.reward
            if chosen.reward < limits.bad_below or gap <= 0 or gap < limits.least_gap:
                continue
            has_gap = True
            shorter, longer = sorted((len(chosen.codes), len(rejected.codes)))
            if longer <= (1 + limits.max_length_gap) * shorter and gap > best_gap:
                best = Pair(first, second)
                best_gap = gap
    if best is not None:
        return best
    return "the lengths differ too much" if has_gap else "the answers are alike"
