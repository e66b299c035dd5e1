"""Policies that ask fewer exits, where that costs little accuracy or none.

Every exit that a policy asks takes time that its MACs do not tell: a head on small maps, a comparison, a regrouping of
the batch, one more call. Towards the upper end of the budgets most exits can go: with two asked in place of seven, half
of the MACs took 0.62 of the full network's time in place of 0.74 (msfuse_cifar, CIFAR-10, 256 images, two cores).

How much may be lost is the difference between two of the solver's methods: 'search' next to nothing, 'fast' a little.
"""
import dataclasses
import itertools
from typing import List, Optional, Sequence, Tuple

import torch

from .geometric import solve_geometric
from .policy import NEVER
from .scores import Scores

MAX_EARLY_EXITS = 3
# By which the average cost may miss the wanted one, as a share of it.
COST_TOLERANCE = 5e-3


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """What fewer exits may cost on the validation images.

    Attributes:
        value: Of the answers' average value (see `search.mixture_values`), of which one point of accuracy is 0.01.
        changes: Share of the images whose answer may turn right or wrong.
        lost: By which the share of right answers may fall.
    """

    value: float
    changes: float
    lost: float


# A fifth of what one image in a thousand weighs. Equal values alone prove little: where three images in a hundred
# change, ten thousand others shift the accuracy by 0.2 points either way; where one in two thousand does, by 0.02.
# Where so few change they mostly turn wrong, for deeper exits are better: so none of the balance may be lost.
NOTHING = Tolerance(2e-4, 5e-4, 0.)
# About as much as one validation set of five thousand can tell, which is why accuracy itself has no bound here.
LITTLE = Tolerance(3e-3, 1., 1.)


@dataclasses.dataclass(frozen=True)
class SparsePath:
    """Thresholds along a path of average budgets.

    Attributes:
        thresholds: One row a budget, float32 (B, num_exits - 1); NEVER at exits that are not asked.
        exits: Which early exits each row asks, None for all.
        before: Where a row asks other exits than that of the next lower budget: the thresholds of those other exits for
            this row's budget, so that rows can be interpolated up to it. Else None.
    """

    thresholds: torch.Tensor
    exits: List[Optional[Tuple[int, ...]]]
    before: List[Optional[torch.Tensor]]


def fewest_exits(
        scores: Scores,
        values: torch.Tensor,
        dense: torch.Tensor,
        budgets: Sequence[float],
        tolerance: Tolerance = NOTHING,
) -> SparsePath:
    """For each budget the thresholds of the fewest exits that are worth about as much as all of them.

    Thresholds of a set of exits are those of the geometric rule with only these exits. From the highest budget down, a
    set is kept as long as it does, so that it changes rarely; from the first budget on at which no set does, all exits
    are asked, for there each of them counts.

    Args:
        scores: Of the validation images, with 0 or 1 as values.
        values: Of their answers, float32 (num_exits, N), see `search.mixture_values`.
        dense: Thresholds of all exits, float32 (len(budgets), num_exits - 1).
        budgets: Wanted average costs as shares of the full cost.
        tolerance: How much less they may be worth, and how far they may answer otherwise.
    """
    last = len(scores.costs) - 1
    valued = dataclasses.replace(scores, values=values)
    wanted = torch.as_tensor(budgets, dtype=torch.float64)
    least = valued.average_values(dense) - tolerance.value
    right = scores.values.gather(0, scores.exits(dense))
    sizes = [list(itertools.combinations(range(last), size)) for size in range(1, min(MAX_EARLY_EXITS, last - 1) + 1)]
    solved, values_of, able = {}, {}, {}
    for exits in itertools.chain(*sizes):
        keep = [*exits, last]
        solved[exits] = torch.full_like(dense, NEVER)
        solved[exits][:, list(exits)] = solve_geometric(
            Scores(valued.confidences[keep], valued.values[keep], valued.costs[keep]), budgets)
        missed = (valued.average_costs(solved[exits]) - wanted).abs() > COST_TOLERANCE * wanted
        values_of[exits] = valued.average_values(solved[exits])
        answers = scores.values.gather(0, scores.exits(solved[exits]))
        changed, lost = (answers != right).double().mean(1), (right - answers).double().mean(1)
        able[exits] = ~missed & (values_of[exits] >= least) & (changed <= tolerance.changes) & (lost <= tolerance.lost)
    # At the full cost nothing leaves early, whatever is asked.
    order = sorted((i for i in range(len(budgets)) if budgets[i] < 1.), key=lambda i: -budgets[i])
    thresholds, chosen, before = dense.clone(), [None] * len(budgets), [None] * len(budgets)
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
        thresholds[i], chosen[i] = solved[current][i], current
    return SparsePath(thresholds, chosen, before)
