"""Policies that use fewer exits, where that costs little accuracy or none.

Each exit in use takes time that its MACs do not show: a head on small maps, a comparison, a regrouping of the batch,
one more call. Towards the upper end of the budgets most exits can be dropped: with two in use instead of seven, half of
the MACs took 0.62 of the full network's time instead of 0.74 (msfuse_cifar, CIFAR-10, 256 images, two cores).

How much accuracy may be lost is the difference between two of the solver's methods: 'search' next to nothing, 'fast' a
little.
"""
import dataclasses
import itertools
from typing import List, Optional, Sequence, Tuple

import numpy as np

from .geometric import solve_geometric
from .policy import NEVER
from .scores import Scores

MAX_EARLY_EXITS = 3
# How far the average cost may be from the budget, as a share of the budget.
COST_TOLERANCE = 5e-3


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """What fewer exits may cost on the validation images.

    Attributes:
        value: Of the answers' average value (see `search.mixture_values`), of which one point of accuracy is 0.01.
        changes: Share of the images whose answer may become correct or wrong.
        lost: Largest loss of accuracy, as a share of the images.
    """

    value: float
    changes: float
    lost: float


# A fifth of the weight of one image in a thousand. Equal values alone prove little: where three images in a hundred
# change, ten thousand others shift the accuracy by 0.2 points either way; where one in two thousand does, by 0.02.
# Where so few change they mostly become wrong, since deeper exits are better: so accuracy may not fall at all.
NOTHING = Tolerance(2e-4, 5e-4, 0.)
# About the resolution of a validation set of five thousand images, which is why accuracy itself has no bound here.
LITTLE = Tolerance(3e-3, 1., 1.)


def fewest_exits(
        scores: Scores,
        values: np.ndarray,
        dense: np.ndarray,
        budgets: Sequence[float],
        tolerance: Tolerance = NOTHING,
) -> Tuple[np.ndarray, List[Optional[np.ndarray]]]:
    """For each budget, thresholds of the fewest exits that are worth about as much as all of them.

    Thresholds of a set of exits are those of the geometric rule with only these exits. From the highest budget down, a
    set is kept while it is within the tolerance, so that it changes rarely; from the first budget at which no set is,
    all exits are in use, since each of them counts there.

    Args:
        scores: Of the validation images, with 0 or 1 as values.
        values: Of their answers, float32 (num_exits, N), see `search.mixture_values`.
        dense: Thresholds of all exits, float32 (len(budgets), num_exits - 1).
        budgets: Average costs as shares of the full cost.
        tolerance: How much less the answers may be worth, and how many may change.

    Returns:
        Thresholds float32 (len(budgets), num_exits - 1), NEVER at exits not in use. And for each budget whose exits are
        not those of the next lower budget, the thresholds of those other exits for this budget, up to which rows can be
        interpolated; else None.
    """
    last = len(scores.costs) - 1
    valued = dataclasses.replace(scores, values=values)
    wanted = np.asarray(budgets, np.float64)
    least = valued.average_values(dense) - tolerance.value
    correct = scores.values_at(scores.exits(dense))
    sizes = [list(itertools.combinations(range(last), size)) for size in range(1, min(MAX_EARLY_EXITS, last - 1) + 1)]
    solved, values_of, able = {}, {}, {}
    for exits in itertools.chain(*sizes):
        keep = [*exits, last]
        solved[exits] = np.full_like(dense, NEVER)
        solved[exits][:, exits] = solve_geometric(
            Scores(valued.confidences[keep], valued.values[keep], valued.costs[keep]), budgets)
        exit_index = valued.exits(solved[exits])
        missed = np.abs(valued.costs[exit_index].mean(1) - wanted) > COST_TOLERANCE * wanted
        values_of[exits] = valued.values_at(exit_index).mean(1, dtype=np.float64)
        change = scores.values_at(exit_index).astype(np.float64) - correct
        able[exits] = (
            ~missed & (values_of[exits] >= least) & (np.abs(change).mean(1) <= tolerance.changes)
            & (-change.mean(1) <= tolerance.lost))
    # At the full cost no image leaves early, whichever exits are in use.
    order = sorted((i for i in range(len(budgets)) if budgets[i] < 1.), key=lambda i: -budgets[i])
    thresholds = dense.copy()
    before: List[Optional[np.ndarray]] = [None] * len(budgets)
    current = None
    for above, i in zip([None, *order], order):
        previous = current
        if current is None or not able[current][i]:
            sets = next(filter(None, ([e for e in sets if able[e][i]] for sets in sizes)), [])
            current = max(sets, key=lambda e: float(values_of[e][i]), default=None)
        if above is not None and current != previous:
            before[above] = dense[above] if current is None else solved[current][above]
        if current is None:
            break
        thresholds[i] = solved[current][i]
    return thresholds, before
