"""Whether promised losses hold: certified on part of the test images, checked on the rest, over many random splits."""
from dataclasses import dataclass
from typing import List, Sequence

import numpy as np
from tqdm import tqdm

from ..errors import InputError
from ..stopping.costs import ExitCosts
from ..stopping.guarantee import certified, risk_losses
from ..stopping.policy import ExitPolicy, as_array
from ..stopping.simulate import simulate
from .evaluate import LabelledLogits

MAX_LOSSES = (0.25, 0.5, 1., 2.)  # points
CERTAINTY = 0.95
SPLITS = 500


@dataclass(frozen=True)
class GuaranteeCheck:
    """How one promise fared over the splits."""

    max_loss: float  # what was promised, in points
    broken: float  # share of the splits whose loss on the other images exceeds it
    median_macs: float  # of the average MACs certified, on all test images; the full cost where nothing is
    nothing: float  # share of the splits in which no candidate is certified
    plug_in_broken: float  # `broken`, for the rule that takes the cheapest candidate whose measured loss is allowed


def check_guarantees(
        candidates: Sequence[ExitPolicy],
        test: LabelledLogits,
        costs: ExitCosts,
        risk: str = 'accuracy',
        max_losses: Sequence[float] = MAX_LOSSES,
        images: int = 2000,
        splits: int = SPLITS,
) -> List[GuaranteeCheck]:
    """Checks promises of certainty `CERTAINTY` on random splits of the test images.

    Args:
        candidates: Policies solved on other images, from the most to the least expensive.
        test: Labelled test logits.
        costs: Costs of the exits.
        risk: See `guarantee.risk_losses`.
        max_losses: In points.
        images: For certification; the others check.
        splits: How many.

    Raises:
        InputError: too few test images to leave any for checking, or arguments out of range.
    """
    logits, labels = as_array(test.logits), as_array(test.targets)
    count = len(labels)
    if not 0 < images < count:
        raise InputError(f'{images} of {count} test images for certification: leave some to check on')
    results = [simulate(policy, logits, costs.macs) for policy in candidates]
    losses = risk_losses(risk, np.stack([r.prediction for r in results]), logits[-1].argmax(1), labels)
    macs = np.array([*(r.average_macs for r in results), costs.macs[-1]])  # the last is that of None below
    rng = np.random.default_rng(0)
    orders = [rng.permutation(count) for _ in range(splits)]
    checks = []
    for max_loss in tqdm(max_losses, desc='guarantees', unit='promise', disable=None):
        chosen, plug_in = [], []
        for order in orders:
            inside = losses[:, order[:images]]
            chosen.append(certified(inside, max_loss, CERTAINTY, risk))
            allowed = np.flatnonzero(inside.mean(1) <= max_loss / 100.)
            plug_in.append(allowed[-1] if len(allowed) else None)
        checks.append(GuaranteeCheck(
            max_loss, _broken(losses, orders, images, chosen, max_loss),
            float(np.median([macs[-1 if k is None else k] for k in chosen])),
            float(np.mean([k is None for k in chosen])), _broken(losses, orders, images, plug_in, max_loss)))
    return checks


def _broken(losses: np.ndarray, orders, images: int, chosen, max_loss: float) -> float:
    return float(np.mean([
        k is not None and losses[k, order[images:]].mean() > max_loss / 100. for k, order in zip(chosen, orders)]))
