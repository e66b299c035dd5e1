"""MSDNet's rule for thresholds, the reference: the share of images that leave at exit k is proportional to q^k.

Huang et al., ICLR 2018, section 4, budgeted batch classification; one q gives one point of the curve.
"""
import math
from typing import Sequence

import torch

from .policy import NEVER
from .scores import Scores, set_ends

_Q_RANGE = (1e-4, 1e2)


def geometric_thresholds(scores: Scores, ratios: Sequence[float]) -> torch.Tensor:
    """Thresholds for each q.

    T_k is the confidence of the floor(N * share_k)-th most confident validation image not yet gone; where that is no
    image at all, none leaves.

    Args:
        scores: Of the validation images.
        ratios: The values of q.

    Returns:
        float32 (len(ratios), num_exits - 1).
    """
    num_exits, images = scores.confidences.shape
    ratios = torch.as_tensor(ratios, dtype=torch.float64)
    shares = (ratios.log().unsqueeze(1) * torch.arange(1, num_exits + 1)).softmax(1)  # q^k / sum q^k without overflow
    wanted = (images * shares).floor().long()
    left = torch.ones(len(ratios), images, dtype=torch.bool)
    thresholds = torch.full((len(ratios), num_exits - 1), NEVER)
    for k in range(num_exits - 1):
        row, order = scores.confidences[k].sort(descending=True)
        taken = left[:, order].cumsum(1)
        last = torch.minimum(wanted[:, k], taken[:, -1])  # fewer are left than wanted: all of them
        position = torch.searchsorted(taken, last.unsqueeze(1)).squeeze(1)
        thresholds[:, k] = torch.where(last > 0, row[position.clamp(max=images - 1)], NEVER)
        left &= scores.confidences[k] < thresholds[:, k:k + 1]
    return thresholds


def solve_geometric(scores: Scores, budgets: Sequence[float]) -> torch.Tensor:
    """Thresholds of the rule for each average cost, by bisection over q.

    Args:
        scores: Of the validation images.
        budgets: Wanted average costs as shares of the full cost.

    Returns:
        float32 (len(budgets), num_exits - 1).
    """
    wanted = torch.as_tensor(budgets, dtype=torch.float64)
    low, high = (torch.full_like(wanted, math.log(q)) for q in _Q_RANGE)
    for _ in range(30):
        middle = (low + high) / 2
        below = scores.average_costs(geometric_thresholds(scores, middle.exp())) < wanted
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    ends = [geometric_thresholds(scores, x.exp()) for x in (low, high)]
    errors = [(scores.average_costs(t) - wanted).abs() for t in ends]
    return set_ends(torch.where((errors[0] <= errors[1]).unsqueeze(1), *ends), wanted, scores)
