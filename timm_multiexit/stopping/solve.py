"""Policies solved on demand: which exits to evaluate, and their thresholds, for an average cost per image.

An image should stop where going on is no longer worth its cost. The chance that a later exit corrects an answer is
about the doubt left in it, 1 - confidence, times the share of this exit's errors that later exits correct. Stopping all
images at the same expected gain makes the thresholds of all exits one number, shifted at each exit by the logarithm of
that share; the number is set so that the images cost what was asked.

Evaluating a head costs time, though next to no MACs. So exits are dropped one by one, the least useful first, as long
as the answers are worth more without, or as much.
"""
import dataclasses
import math
from typing import List, Optional, Sequence, Tuple

import numpy as np

from ..errors import InputError
from .costs import StageCosts
from .policy import ALWAYS, NEVER, ExitPolicy
from .scores import UNKNOWN, ExitScores

GRID_BUDGETS = 41
# How much less the answers may be worth with fewer exits in use (0.02 points of accuracy).
TOLERANCE = 2e-4
_MIN_CORRECTED = 1e-6


def budget_grid(low: float, high: float, count: int = GRID_BUDGETS) -> Tuple[float, ...]:
    """Average costs between the cheapest answer and the full network, densest near both ends, which are included."""
    inner = [low + (high - low) * (1. - math.cos(math.pi * i / (count - 1))) / 2 for i in range(1, count - 1)]
    return (float(low), *inner, float(high))


class Solver:
    """Solves policies on the scores of development images.

    Args:
        scores: Scores of the images.
        costs: Costs of stages and heads, in any unit.
        exit_macs: Cumulative MACs of each exit, for the reports.
        temperatures: One per exit.
        measure: Confidence measure of the scores.
    """

    def __init__(self, scores: ExitScores, costs: StageCosts, exit_macs: Sequence[int], temperatures: Sequence[float],
                 measure: str = 'max_softmax'):
        self.scores, self.costs, self.exit_macs = scores, costs, np.asarray(exit_macs)
        self.temperatures, self.measure = tuple(temperatures), measure
        self.values = scores.values(measure)
        reached = self.values.mean(1)
        best_later = np.maximum.accumulate(reached[::-1])[::-1][1:]
        corrected = (best_later - reached[:-1]) / np.maximum(1. - reached[:-1], _MIN_CORRECTED)
        self.shifts = np.log(np.maximum(corrected, _MIN_CORRECTED))
        self.gains = scores.scores[:-1] - self.shifts[:, None]  # minus the logarithm of what going on may gain

    def thresholds(self, exits: Sequence[int], budget: float) -> Optional[np.ndarray]:
        """Thresholds (num_exits,) if images may leave at some early exits alone, for an average cost at most `budget`.

        The cheaper neighbour where the images cannot be split to meet it; None if it is below the first of the exits.
        """
        last = len(self.gains)
        costs = self.costs.of_exits((*exits, last))
        row = np.full(last + 1, NEVER)
        row[last] = ALWAYS
        if costs[0] > budget:
            return None
        highest = np.maximum.accumulate(self.gains[list(exits)], 0)  # an image stays while all so far are below
        steps = np.diff(costs)

        def cost(threshold: float) -> float:
            return costs[0] + float(steps @ (highest < threshold).mean(1))

        if cost(np.inf) <= budget:
            return row
        low, high = float(highest.min()), float(np.nextafter(highest.max(), np.inf))
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if cost(middle) <= budget else (low, middle)
        below = highest[highest < low]
        for k in exits:
            # Midway between two images, so that rounding moves none of them to another exit.
            row[k] = (low + below.max()) / 2 + self.shifts[k] if below.size else ALWAYS
        return row

    def checked(self, budget: float) -> float:
        """A budget that can be kept. Costs are printed in rounded form, so up to 0.1 % outside stands for the end.

        Raises:
            InputError: it is below the cheapest answer, above the full cost, or no number.
        """
        low, high, form = self.costs.cheapest, self.costs.full, self.costs.format
        if not low * 0.999 <= budget <= high * 1.001:
            if self.costs.unit == 'MACs' and low <= budget * 1e6 <= high:
                raise InputError(f'an average budget of {budget:g} MACs: did you mean {budget:g}M?')
            raise InputError(
                f'an average budget of {form(budget)} cannot be kept: choose one from {form(low)} (all images leave at '
                f'the first exit) to {form(high)} (none leaves early)')
        return min(max(budget, low), high)

    def best(self, budget: float) -> np.ndarray:
        """Thresholds (num_exits,) of the exits that are worth most at an average cost of at most `budget`.

        Raises:
            InputError: see `checked`.
        """
        budget, last = self.checked(budget), len(self.gains)
        best = np.array([NEVER] * last + [ALWAYS])
        if budget >= self.costs.full:
            return best
        first = next(k for k in range(last + 1) if self.costs.of_exits((k,))[0] <= budget)
        sets, highest = [tuple(range(first, last))], -1.
        while True:
            solved = [(exits, row) for exits in sets if (row := self.thresholds(exits, budget)) is not None]
            worth, used, row = max(((self.worth(row), exits, row) for exits, row in solved), key=lambda found: found[0],
                                   default=(-1., (), best))
            if worth < highest - TOLERANCE or not solved:
                return best
            best, highest = row, max(worth, highest)
            sets = [used[:i] + used[i + 1:] for i in range(len(used)) if len(used) > 1]

    def worth(self, thresholds: np.ndarray) -> float:
        """Average value of the answers."""
        return float(self.values[self.scores.exits(thresholds), np.arange(self.scores.num_images)].mean())

    def policy(self, thresholds: np.ndarray) -> ExitPolicy:
        """The policy of thresholds, with what it gives on these images."""
        policy = ExitPolicy(tuple(thresholds), self.temperatures, self.measure)
        exit_index = self.scores.exits(thresholds)
        known = self.scores.labels != UNKNOWN
        correct = self.scores.correct()[exit_index, np.arange(self.scores.num_images)]
        shares = np.bincount(exit_index, minlength=len(self.exit_macs)) / len(exit_index)
        return dataclasses.replace(
            policy, expected_macs=round(float(self.exit_macs[exit_index].mean())),
            expected_ms=float(shares[list(policy.exits_in_use)] @ self.costs.of_exits(policy.exits_in_use))
            if self.costs.unit == 'ms' else None,
            expected_accuracy=round(100. * float(correct[known].mean()), 3) if known.any() else None,
            exit_shares=tuple(shares.round(5)))

    def path(self) -> List[ExitPolicy]:
        """Policies from the most to the least expensive, fixed by these images alone."""
        rows = {tuple(self.best(b)): None for b in budget_grid(self.costs.cheapest, self.costs.full)[::-1]}
        policies = [self.policy(np.array(row)) for row in rows]
        return policies[1:] or policies  # the first is the full network
