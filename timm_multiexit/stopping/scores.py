"""Validation logits as the solvers see them: how sure each exit is of each image, how often right, at what cost."""
from dataclasses import dataclass
from typing import Optional, Sequence

import torch

from ..errors import InputError
from .policy import NEVER, confidence


def check_labelled_logits(logits: Sequence[torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
    """Logits of all exits as one tensor, checked.

    Args:
        logits: One (N, num_classes) per exit, a list or a stacked tensor.
        targets: int64 (N,).

    Returns:
        float32 (num_exits, N, num_classes).

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
        raise InputError('logits of a single class: there is nothing to be sure of, give two or more classes')
    stacked = torch.stack([x.detach().float() for x in logits])
    bad = ~torch.isfinite(stacked).all(2).all(0)
    if bad.any():
        raise InputError(
            f'{int(bad.sum())} of {images} images have NaN or infinite logits: check the images and the weights')
    if targets.shape != (images,):
        raise InputError(f'targets of shape {tuple(targets.shape)} for {images} images: give one label per image')
    if targets.is_floating_point() or targets.min() < 0 or targets.max() >= classes:
        raise InputError(
            f'labels from {targets.min().item()} to {targets.max().item()} for {classes} classes: '
            f'give whole numbers from 0 to {classes - 1}')
    return stacked


@dataclass(frozen=True)
class Scores:
    """Confidence and value of every exit on every validation image.

    Attributes:
        confidences: float32 (num_exits, N).
        values: What an answer is worth, float32 (num_exits, N): 1 if it is right and 0 if not, or an estimate.
        costs: Cumulative cost of each exit as a share of the full cost, float64 (num_exits,).
    """

    confidences: torch.Tensor
    values: torch.Tensor
    costs: torch.Tensor

    @classmethod
    def from_logits(
            cls,
            logits: torch.Tensor,
            targets: torch.Tensor,
            exit_macs: Sequence[int],
            temperatures: Sequence[float],
            measure: str,
    ) -> 'Scores':
        """Scores of logits (num_exits, N, num_classes) against targets (N,), with 0 or 1 as values."""
        confidences = torch.stack([confidence(x, measure, t) for x, t in zip(logits, temperatures)])
        costs = torch.tensor(list(exit_macs), dtype=torch.float64)
        return cls(confidences, (logits.argmax(2) == targets).float(), costs / costs[-1])

    @property
    def num_images(self) -> int:
        return self.confidences.shape[1]

    def subset(self, index: torch.Tensor) -> 'Scores':
        """The scores of some images."""
        return Scores(self.confidences[:, index], self.values[:, index], self.costs)

    def exits(self, thresholds: torch.Tensor) -> torch.Tensor:
        """Exit of each image under each row of thresholds (P, num_exits - 1), int64 (P, N)."""
        exit_index = torch.full((len(thresholds), self.num_images), len(self.costs) - 1)
        for k in range(len(self.costs) - 2, -1, -1):
            exit_index[self.confidences[k] >= thresholds[:, k:k + 1]] = k
        return exit_index

    def average_costs(self, thresholds: torch.Tensor) -> torch.Tensor:
        """Average cost, as a share of the full one, under each row of thresholds; float64 (P,)."""
        return self.costs[self.exits(thresholds)].mean(1)

    def average_values(self, thresholds: torch.Tensor) -> torch.Tensor:
        """Average value of the answers under each row of thresholds, float64 (P,)."""
        return self.values.gather(0, self.exits(thresholds)).double().mean(1)


class Quantiles:
    """Thresholds as ranks: the share of validation images that are less sure than the threshold, exit by exit.

    Ranks are what may be averaged and interpolated: confidences crowd near 1, and differently at each exit.
    Rank 0 lets all images leave, rank 1 none.

    Args:
        confidences: float32 (num_exits, N); the last exit's are not used.
    """

    def __init__(self, confidences: torch.Tensor):
        self.sorted = confidences[:-1].sort(1).values
        rows = self.sorted
        # Between two images' confidences, so that rounding moves no validation image to another exit.
        middle = (rows[:, 1:] + rows[:, :-1]) / 2
        self.knots = torch.cat([torch.zeros(len(rows), 1), middle, torch.ones(len(rows), 1)], 1)

    def ranks(self, thresholds: torch.Tensor) -> torch.Tensor:
        """Ranks, float64 (P, num_exits - 1), of thresholds of that shape."""
        columns = [torch.searchsorted(row, thresholds[:, k].contiguous()) for k, row in enumerate(self.sorted)]
        return torch.stack(columns, 1).double() / self.sorted.shape[1]

    def thresholds(self, ranks: torch.Tensor) -> torch.Tensor:
        """Thresholds, float32 (P, num_exits - 1), of ranks of that shape."""
        position = ranks.clamp(0., 1.) * self.sorted.shape[1]
        low = position.floor().long().clamp(max=self.sorted.shape[1] - 1)
        weight = (position - low).float()
        columns = []
        for k, knots in enumerate(self.knots):
            i, w = low[:, k], weight[:, k]
            columns.append(torch.where(ranks[:, k] >= 1., NEVER, torch.lerp(knots[i], knots[i + 1], w)))
        return torch.stack(columns, 1)


def thresholds_at(
        scores: Scores,
        path: torch.Tensor,
        budgets: Sequence[float],
        quantiles: Optional[Quantiles] = None,
) -> torch.Tensor:
    """Thresholds along a path of ranks whose average costs on the validation images are the wanted ones.

    Args:
        scores: Of the validation images.
        path: Ranks float64 (P, num_exits - 1), by rising cost; the ends (all leave at the first exit, none leaves
            early) are added here.
        budgets: Wanted average costs as shares of the full cost.
        quantiles: Of the images that the ranks refer to, by default these.

    Returns:
        float32 (len(budgets), num_exits - 1).
    """
    quantiles = quantiles or Quantiles(scores.confidences)
    path = torch.cat([torch.zeros_like(path[:1]), path, torch.ones_like(path[:1])])
    costs = scores.average_costs(quantiles.thresholds(path)).cummax(0).values
    wanted = torch.as_tensor(budgets, dtype=torch.float64)
    upper = torch.searchsorted(costs, wanted).clamp(1, len(costs) - 1)
    low, high = torch.zeros_like(wanted), torch.ones_like(wanted)

    def at(weight: torch.Tensor) -> torch.Tensor:
        return quantiles.thresholds(torch.lerp(path[upper - 1], path[upper], weight.unsqueeze(1)))

    for _ in range(20):  # bisection to a millionth of one step of the path
        middle = (low + high) / 2
        below = scores.average_costs(at(middle)) < wanted
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    candidates = [at(low), at(high)]
    errors = [(scores.average_costs(t) - wanted).abs() for t in candidates]
    return set_ends(torch.where((errors[0] <= errors[1]).unsqueeze(1), *candidates), wanted, scores)


def set_ends(thresholds: torch.Tensor, budgets: torch.Tensor, scores: Scores) -> torch.Tensor:
    """Makes the cheapest exit and the full cost hold for every image, those beyond the validation images too."""
    thresholds[budgets <= scores.costs[0]] = 0.
    thresholds[budgets >= scores.costs[-1]] = NEVER
    return thresholds
