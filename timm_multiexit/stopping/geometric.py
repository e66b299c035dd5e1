"""The geometric rule of MSDNet, the reference: the share of images that leave at exit k is proportional to q^k.

Huang et al., ICLR 2018, section 4, budgeted batch classification; each q gives one point of the curve.
"""
import math
from typing import Sequence, Union

import numpy as np

from .policy import NEVER, leaves
from .scores import Scores, set_ends

_Q_RANGE = (1e-4, 1e2)


def geometric_thresholds(scores: Scores, ratios: Union[Sequence[float], np.ndarray]) -> np.ndarray:
    """Thresholds for each q.

    T_k is the confidence of the floor(N * share_k)-th most confident validation image that has not left before; where
    that is no image, none leaves.

    Args:
        scores: Of the validation images.
        ratios: The values of q.

    Returns:
        float32 (len(ratios), num_exits - 1).
    """
    num_exits, images = scores.confidences.shape
    powers = np.log(np.asarray(ratios))[:, None] * np.arange(1, num_exits + 1)
    shares = np.exp(powers - powers.max(1, keepdims=True))  # q^k / sum q^k without overflow
    shares /= shares.sum(1, keepdims=True)
    wanted = np.floor(images * shares).astype(np.int64)
    present = np.ones((len(powers), images), bool)
    thresholds = np.full((len(powers), num_exits - 1), NEVER, np.float32)
    for k in range(num_exits - 1):
        order = scores.order[k]
        taken = present[:, order].cumsum(1, dtype=np.int32)
        last = np.minimum(wanted[:, k], taken[:, -1])  # all of them where fewer are left than wanted
        position = (taken < last[:, None]).sum(1)
        row = scores.confidences[k][order]
        thresholds[:, k] = np.where(last > 0, row[position.clip(max=images - 1)], NEVER)
        present &= ~leaves(scores.confidences[k], thresholds[:, k:k + 1])
    return thresholds


def solve_geometric(scores: Scores, budgets: Union[Sequence[float], np.ndarray]) -> np.ndarray:
    """The rule's thresholds for each average cost, by bisection over log q.

    Args:
        scores: Of the validation images.
        budgets: Average costs as shares of the full cost.

    Returns:
        float32 (len(budgets), num_exits - 1).
    """
    wanted = np.asarray(budgets, np.float64)
    low, high = (np.full_like(wanted, math.log(q)) for q in _Q_RANGE)
    for _ in range(30):
        middle = (low + high) / 2
        below = scores.average_costs(geometric_thresholds(scores, np.exp(middle))) < wanted
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    ends = [geometric_thresholds(scores, np.exp(x)) for x in (low, high)]
    errors = [np.abs(scores.average_costs(t) - wanted) for t in ends]
    return set_ends(np.where((errors[0] <= errors[1])[:, None], *ends), wanted, scores)
