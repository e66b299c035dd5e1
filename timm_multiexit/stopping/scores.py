"""Validation images as the solvers see them: per exit the confidence, the value of its answer, and the cost."""
from dataclasses import dataclass
from functools import cached_property
from typing import Optional, Sequence, Tuple, Union

import numpy as np

from ..errors import InputError
from .policy import NEVER, as_array, confidence, leaves


def check_labelled_logits(logits: Sequence[np.ndarray], targets: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """Logits of all exits and their labels as arrays, checked.

    Args:
        logits: One (N, num_classes) per exit, a list or stacked; arrays or tensors.
        targets: Integers (N,), likewise.

    Returns:
        Logits float32 (num_exits, N, num_classes) and targets (N,).

    Raises:
        InputError: no exits or images, exits that differ in shape, one class, NaN or infinite logits, or labels that
            are not one per image from 0 to num_classes - 1.
    """
    if len(logits) == 0 or any(x.ndim != 2 or x.shape != logits[0].shape for x in logits):
        raise InputError(
            f'logits of shapes {[tuple(x.shape) for x in logits]}: give one (images, classes) per exit, all alike')
    images, classes = logits[0].shape
    if images == 0:
        raise InputError('logits of no images: give at least one')
    if classes < 2:
        raise InputError('logits of a single class have no confidence: give two or more classes')
    stacked, targets = np.stack([as_array(x).astype(np.float32) for x in logits]), as_array(targets)
    bad = ~np.isfinite(stacked).all(2).all(0)
    if bad.any():
        raise InputError(
            f'{bad.sum()} of {images} images have NaN or infinite logits: check the images and the weights')
    if targets.shape != (images,):
        raise InputError(f'targets of shape {targets.shape} for {images} images: give one label per image')
    if targets.dtype.kind not in 'iu' or targets.min() < 0 or targets.max() >= classes:
        raise InputError(
            f'labels from {targets.min()} to {targets.max()} for {classes} classes: '
            f'give whole numbers from 0 to {classes - 1}')
    return stacked, targets


@dataclass(frozen=True)
class Scores:
    """Confidence and value of every exit on every validation image.

    Attributes:
        confidences: float32 (num_exits, N).
        values: What each answer is worth, float32 (num_exits, N): 1 if correct, else 0, or an estimate between.
        costs: Cumulative cost of each exit as a share of the full cost, float64 (num_exits,).
    """

    confidences: np.ndarray
    values: np.ndarray
    costs: np.ndarray

    @classmethod
    def from_logits(
            cls,
            logits: np.ndarray,
            targets: np.ndarray,
            exit_macs: Sequence[int],
            temperatures: Sequence[float],
            measure: str,
    ) -> 'Scores':
        """Scores of logits (num_exits, N, num_classes) against targets (N,), with 0 or 1 as values."""
        confidences = np.stack([confidence(x, measure, t) for x, t in zip(logits, temperatures)])
        costs = np.asarray(exit_macs, np.float64)
        return cls(confidences, (logits.argmax(2) == targets).astype(np.float32), costs / costs[-1])

    @property
    def num_images(self) -> int:
        return self.confidences.shape[1]

    @cached_property
    def order(self) -> np.ndarray:
        """Images by falling confidence, for each exit; int64 (num_exits, N)."""
        return (-self.confidences).argsort(1, kind='stable')

    def subset(self, index: np.ndarray) -> 'Scores':
        """The scores of some images."""
        return Scores(self.confidences[:, index], self.values[:, index], self.costs)

    def exits(self, thresholds: np.ndarray) -> np.ndarray:
        """Exit of each image under each row of thresholds (P, num_exits - 1), int64 (P, N)."""
        exit_index = np.full((len(thresholds), self.num_images), len(self.costs) - 1)
        for k in range(len(self.costs) - 2, -1, -1):
            np.copyto(exit_index, k, where=leaves(self.confidences[k], thresholds[:, k:k + 1]))
        return exit_index

    def values_at(self, exit_index: np.ndarray) -> np.ndarray:
        """Value of the answer that each image gets at its exit (P, N); float32 (P, N)."""
        return self.values[exit_index, np.arange(self.num_images)]

    def average_costs(self, thresholds: np.ndarray) -> np.ndarray:
        """Average cost, as a share of the full cost, under each row of thresholds; float64 (P,)."""
        return self.costs[self.exits(thresholds)].mean(1)

    def average_values(self, thresholds: np.ndarray) -> np.ndarray:
        """Average value of the answers under each row of thresholds, float64 (P,)."""
        return self.values_at(self.exits(thresholds)).mean(1, dtype=np.float64)


def lerp(a: np.ndarray, b: np.ndarray, weight: Union[float, np.ndarray]) -> np.ndarray:
    """From a (weight 0) to b (weight 1)."""
    return a + weight * (b - a)


def interpolate(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> np.ndarray:
    """y at places of a curve through points (x, y) in any order; linear between them and constant outside."""
    order = np.argsort(x, kind='stable')
    return np.interp(at, np.asarray(x)[order], np.asarray(y)[order])


class Quantiles:
    """Thresholds as ranks: per exit, the share of validation images whose confidence is below the threshold.

    Ranks can be averaged and interpolated; confidences crowd near 1, and differently at each exit. At rank 0 all images
    leave, at rank 1 none.

    Args:
        confidences: float32 (num_exits, N); the last exit's are not used.
    """

    def __init__(self, confidences: np.ndarray):
        self.sorted = rows = np.sort(confidences[:-1], 1)
        # Midway between two images, so that rounding moves no validation image to another exit.
        middle = (rows[:, 1:] + rows[:, :-1]) / 2
        self.knots = np.pad(middle, ((0, 0), (1, 1)), constant_values=((0., 0.), (0., 1.)))

    def ranks(self, thresholds: np.ndarray) -> np.ndarray:
        """Ranks, float64 (P, num_exits - 1), of thresholds of that shape."""
        columns = [np.searchsorted(row, thresholds[:, k]) for k, row in enumerate(self.sorted)]
        return np.stack(columns, 1) / self.sorted.shape[1]

    def thresholds(self, ranks: np.ndarray) -> np.ndarray:
        """Thresholds, float32 (P, num_exits - 1), of ranks of that shape."""
        images = self.sorted.shape[1]
        position = ranks.clip(0., 1.) * images
        low = np.floor(position).astype(np.int64).clip(max=images - 1)
        exits = np.arange(len(self.knots))
        between = lerp(self.knots[exits, low], self.knots[exits, low + 1], (position - low).astype(np.float32))
        return np.where(ranks >= 1., np.float32(NEVER), between)


def thresholds_at(
        scores: Scores,
        path: np.ndarray,
        budgets: Union[Sequence[float], np.ndarray],
        quantiles: Optional[Quantiles] = None,
) -> np.ndarray:
    """Thresholds along a path of ranks whose average costs on the validation images are the budgets.

    Args:
        scores: Of the validation images.
        path: Ranks float64 (P, num_exits - 1), by rising cost; both ends (all images leave at the first exit, none
            leaves early) are added here.
        budgets: Average costs as shares of the full cost.
        quantiles: Of the images that the ranks refer to; by default those of `scores`.

    Returns:
        float32 (len(budgets), num_exits - 1).
    """
    quantiles = quantiles or Quantiles(scores.confidences)
    path = np.concatenate([np.zeros_like(path[:1]), path, np.ones_like(path[:1])])
    costs = np.maximum.accumulate(scores.average_costs(quantiles.thresholds(path)))
    wanted = np.asarray(budgets, np.float64)
    upper = np.searchsorted(costs, wanted).clip(1, len(costs) - 1)
    low, high = np.zeros_like(wanted), np.ones_like(wanted)

    def at(weight: np.ndarray) -> np.ndarray:
        return quantiles.thresholds(lerp(path[upper - 1], path[upper], weight[:, None]))

    for _ in range(20):  # bisection to a millionth of one step of the path
        middle = (low + high) / 2
        below = scores.average_costs(at(middle)) < wanted
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    candidates = [at(low), at(high)]
    errors = [np.abs(scores.average_costs(t) - wanted) for t in candidates]
    return set_ends(np.where((errors[0] <= errors[1])[:, None], *candidates), wanted, scores)


def set_ends(thresholds: np.ndarray, budgets: np.ndarray, scores: Scores) -> np.ndarray:
    """Sets the rows of the cheapest exit and of the full cost so that they hold for every image, not only these."""
    thresholds[budgets <= scores.costs[0]] = 0.
    thresholds[budgets >= scores.costs[-1]] = NEVER
    return thresholds
