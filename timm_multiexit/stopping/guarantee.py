"""Policies with a guaranteed loss: Learn then Test (Angelopoulos et al., 2021) over a fixed sequence of candidates.

The candidates, from the most to the least expensive, are fixed before the certification images are looked at. Each is
tested for "its risk exceeds what is allowed"; the answer is the last one for which that, and every earlier one, was
rejected. Then, with the requested certainty over the draw of the certification images, its risk on new images of the
same distribution (exchangeable ones) is at most what is allowed, for any network and any number of images.
"""
import math
from typing import Optional

import numpy as np

from ..errors import InputError

RISKS = ('accuracy', 'harm', 'consistency')


def risk_losses(
        risk: str,
        answers: np.ndarray,
        full: np.ndarray,
        labels: Optional[np.ndarray] = None,
) -> np.ndarray:
    """What each candidate loses on each image, against the full network.

    Args:
        risk: 'accuracy' (wrong answers of the policy less those of the full network; gains pay for losses), 'harm' (the
            policy is wrong where the full network is correct) or 'consistency' (it differs; needs no labels).
        answers: Classes of each candidate, int (candidates, N).
        full: Classes of the last exit, int (N,).
        labels: Correct classes, int (N,).

    Returns:
        int8 (candidates, N): -1, 0 or 1 for 'accuracy', else 0 or 1.

    Raises:
        InputError: unknown risk, or no labels where it needs them.
    """
    if risk not in RISKS:
        raise InputError(f"unknown risk '{risk}': choose one of {', '.join(RISKS)}")
    if risk == 'consistency':
        return (answers != full).astype(np.int8)
    if labels is None:
        raise InputError(f"the risk '{risk}' needs labels: without them choose consistency")
    wrong, full_wrong = answers != labels, full != labels
    if risk == 'harm':
        return (wrong & ~full_wrong).astype(np.int8)
    return wrong.astype(np.int8) - full_wrong.astype(np.int8)


def binomial_tail(successes: int, trials: int, probability: float) -> float:
    """P(Bin(trials, probability) <= successes), exact.

    >>> round(binomial_tail(5, 1000, 0.01), 4)
    0.0661
    """
    if successes >= trials or probability <= 0.:
        return 1.
    if successes < 0 or probability >= 1.:
        return 0.
    k = np.arange(successes + 1)
    chosen = [math.lgamma(trials + 1) - math.lgamma(i + 1) - math.lgamma(trials - i + 1) for i in k]
    logs = np.array(chosen) + k * math.log(probability) + (trials - k) * math.log1p(-probability)
    top = logs.max()
    return min(1., math.exp(top) * float(np.exp(logs - top).sum()))


def binomial_passes(losses: np.ndarray, allowed: float, failure: float) -> np.ndarray:
    """Whether "the mean of 0/1 losses exceeds `allowed`" is rejected at level `failure`; bool (candidates,)."""
    images = losses.shape[1]
    return np.array([binomial_tail(int(count), images, allowed) <= failure for count in losses.sum(1)], bool)


def betting_passes(losses: np.ndarray, allowed: float, failure: float) -> np.ndarray:
    """Whether "the mean of losses up to 1 exceeds `allowed`" is rejected at level `failure`; bool (candidates,).

    A bettor against that hypothesis, who stakes a predictable share nu of the wealth on each image in turn, rarely
    multiplies it by 1 / failure if the hypothesis holds (Waudby-Smith and Ramdas, 2023, sections 3 and 4.1).

    Args:
        losses: (candidates, n), at most 1, in an order that does not depend on them.
        allowed: Mean loss, above 0.
        failure: Probability of a wrong rejection.
    """
    x = losses.astype(np.float64)
    images = x.shape[1]
    count = np.arange(1, images + 1)
    mean = (0.5 + x.cumsum(1)) / (count + 1)
    variance = (0.25 + ((x - mean) ** 2).cumsum(1)) / (count + 1)
    before = np.concatenate([np.full((len(x), 1), 0.25), variance[:, :-1]], 1)
    stake = np.minimum(np.sqrt(2. * math.log(1. / failure) / (images * before)), 1.)
    wealth = np.log1p(-stake * (x - allowed)).cumsum(1)
    return wealth.max(1) > math.log(1. / failure)


def certified(losses: np.ndarray, max_loss: float, certainty: float = 0.95, risk: str = 'accuracy') -> Optional[int]:
    """The least expensive candidate whose risk is certified.

    Args:
        losses: (candidates, n), see `risk_losses`; from the most to the least expensive candidate, images at random.
        max_loss: Risk allowed, in points (0.5 is half a percent).
        certainty: Probability that the promise holds, over the draw of the images.
        risk: That of the losses.

    Returns:
        Index of the candidate, or None if not even the first passes.

    Raises:
        InputError: numbers out of range.
    """
    if not 0. < max_loss < 100.:
        raise InputError(f'a loss of at most {max_loss} points: give a number above 0 and below 100')
    if not 0. < certainty < 1.:
        raise InputError(f'a certainty of {certainty}: give a probability between 0 and 1, such as 0.95')
    passes = _passes(losses, max_loss, certainty, risk)
    failed = np.flatnonzero(~passes)
    last = (failed[0] if len(failed) else len(passes)) - 1  # the last that passed, not the first that failed
    return int(last) if last >= 0 else None


def tightest(losses: np.ndarray, certainty: float, risk: str) -> float:
    """The smallest `max_loss` that `certified` grants the losses (n,) of a candidate, in points, up to a hundredth."""
    low, high = 0, 10_000  # hundredths
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _passes(losses[None], middle / 100., certainty, risk)[0] else (middle, high)
    return high / 100.


def _passes(losses: np.ndarray, max_loss: float, certainty: float, risk: str) -> np.ndarray:
    test = betting_passes if risk == 'accuracy' else binomial_passes
    return test(losses, max_loss / 100., 1. - certainty)
