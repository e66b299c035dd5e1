"""From validation logits to policies: temperatures, a grid of budgets, and thresholds by one of three methods."""
import dataclasses
import math
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np

from ..errors import InputError
from .config import ExitConfig
from .costs import ExitCosts
from .fewest_exits import LITTLE, NOTHING, fewest_exits
from .geometric import solve_geometric
from .policy import MEASURES, ExitPolicy, check_average_budget
from .scores import Scores, check_labelled_logits
from .search import mixture_values, solve_search
from .simulate import simulate
from .temperature import fit_temperature

METHODS = ('search', 'fast', 'geometric')
GRID_BUDGETS = 41


def budget_grid(exit_macs: Sequence[float], count: int = GRID_BUDGETS) -> Tuple[float, ...]:
    """Average budgets from the cheapest exit to the full cost, densest near both ends.

    Thresholds change fastest near the ends, where the first images go on or the last ones leave.

    Args:
        exit_macs: Cumulative MACs of each exit.
        count: How many, 2 or more.
    """
    low, high = exit_macs[0], exit_macs[-1]
    inner = [low + (high - low) * (1. - math.cos(math.pi * i / (count - 1))) / 2 for i in range(1, count - 1)]
    return (float(low), *(float(round(b)) for b in inner), float(high))


def solve_policies(
        logits: Sequence[np.ndarray],
        targets: np.ndarray,
        exit_macs: Sequence[int],
        methods: Sequence[str] = METHODS,
        budgets: Optional[Sequence[float]] = None,
        measure: str = 'max_softmax',
        temperatures: Optional[Sequence[float]] = None,
        seed: int = 0,
) -> Dict[str, List[ExitPolicy]]:
    """Policies for a family of average budgets, by one or more methods.

    Args:
        logits: Validation logits, one (N, num_classes) per exit, of images under the test transform on which the
            network was not trained; arrays or tensors.
        targets: Their labels, int64 (N,).
        exit_macs: Cumulative MACs of each exit.
        methods: 'search' (best accuracy, then fewest exits; see `search` and `fewest_exits`), 'fast' (as few exits as
            cost no more than 0.3 points, which takes less time at equal cost; see `fewest_exits`) or 'geometric'
            (MSDNet's rule, see `geometric`).
        budgets: Average MACs per image; None for `budget_grid`, and one MAC below each of its budgets where 'search'
            or 'fast' begins to use other exits, so that thresholds can be interpolated between any two neighbours.
        measure: Confidence measure, see `policy.confidence`.
        temperatures: One per exit; None to fit them.
        seed: Of the folds and reweightings of 'search' and 'fast'.

    Returns:
        By method, one policy per budget, in the given order (rising if none are given), each with what it gives on
        these images.

    Raises:
        InputError: logits, labels or budgets that cannot be used, unknown method or measure.
    """
    for method in methods:
        if method not in METHODS:
            raise InputError(f"unknown method '{method}': choose one of {', '.join(METHODS)}")
    if measure not in MEASURES:
        raise InputError(f"unknown confidence measure '{measure}': choose one of {', '.join(MEASURES)}")
    stacked, targets = check_labelled_logits(logits, targets)
    if len(exit_macs) != len(logits):
        raise InputError(f'{len(exit_macs)} costs for the logits of {len(logits)} exits: give one cost per exit')
    fill = budgets is None
    budgets = [check_average_budget(b, exit_macs) for b in (budget_grid(exit_macs) if fill else budgets)]
    if temperatures is None:
        temperatures = [round(fit_temperature(x, targets), 4) for x in stacked]
    scores = Scores.from_logits(stacked, targets, exit_macs, temperatures, measure)
    shares = [b / exit_macs[-1] for b in budgets]
    if len(logits) > 1 and set(methods) != {'geometric'}:
        values = mixture_values(stacked, targets)
        dense = solve_search(scores, values, shares, seed)
    families = {}
    for method in methods:
        if len(logits) == 1:
            rows = [(b, np.zeros(0)) for b in budgets]
        elif method == 'geometric':
            rows = list(zip(budgets, solve_geometric(scores, shares)))
        else:
            thresholds, before = fewest_exits(scores, values, dense, shares, LITTLE if method == 'fast' else NOTHING)
            rows = list(zip(budgets, thresholds))
            if fill:
                rows += [(b - 1, row) for b, row in zip(budgets, before) if row is not None]
                rows.sort(key=lambda pair: pair[0])
        families[method] = []
        for budget, row in rows:
            row = (round(t, 9) for t in row.tolist())  # finer than float32, in which confidences are compared with it
            policy = ExitPolicy((*row, 0.), tuple(temperatures), measure, budget, method=method)
            families[method].append(_with_expectations(policy, stacked, targets, exit_macs))
    return families


def _with_expectations(policy: ExitPolicy, logits, targets, exit_macs) -> ExitPolicy:
    result = simulate(policy, logits, exit_macs)
    return dataclasses.replace(
        policy, expected_macs=round(result.average_macs), expected_accuracy=round(result.accuracy(targets), 3),
        exit_shares=tuple(round(s, 5) for s in result.exit_shares(policy.num_exits)))


def solve_exit_config(
        logits: Sequence[np.ndarray],
        targets: np.ndarray,
        costs: ExitCosts,
        class_names: Optional[Sequence[str]] = None,
        method: str = 'search',
        **kwargs,
) -> ExitConfig:
    """Everything that is stored with weights, from validation logits; further arguments as `solve_policies`.

    The policies of one method are stored, and those of 'fast' beside them.
    """
    families = solve_policies(logits, targets, costs.macs, (method, 'fast'), **kwargs)
    policies = families[method]
    return ExitConfig(
        costs.macs, costs.params, costs.input_size, policies[0].temperatures, tuple(policies),
        None if class_names is None else tuple(class_names), tuple(families['fast']))
