"""A stopping rule applied to the logits of all exits: the decisions of a real early exit, without its savings."""
from dataclasses import dataclass
from typing import Sequence, Tuple

import torch

from .policy import ExitPolicy


@dataclass(frozen=True)
class Simulation:
    """What a policy decides about images whose every exit was computed, in input order.

    Attributes:
        exit_index: Exit that answers, int64 (N,).
        prediction: Its class, int64 (N,).
        confidence: Its confidence, float32 (N,).
        macs: MACs spent on each image, int64 (N,).
    """

    exit_index: torch.Tensor
    prediction: torch.Tensor
    confidence: torch.Tensor
    macs: torch.Tensor

    @property
    def average_macs(self) -> float:
        return float(self.macs.double().mean())

    def accuracy(self, targets: torch.Tensor) -> float:
        """Top-1 accuracy in percent against targets, int64 (N,)."""
        return 100. * float((self.prediction == targets).double().mean())

    def exit_shares(self, num_exits: int) -> Tuple[float, ...]:
        """Share of the images that leave at each exit."""
        counts = torch.bincount(self.exit_index, minlength=num_exits)
        return tuple((counts.double() / len(self.exit_index)).tolist())


def simulate(policy: ExitPolicy, logits: Sequence[torch.Tensor], exit_macs: Sequence[int]) -> Simulation:
    """Applies a policy to logits of all exits: nothing is saved, but the decisions are those of a real early exit.

    Args:
        policy: The policy.
        logits: One (N, num_classes) per exit, a list or a stacked tensor.
        exit_macs: Cumulative MACs of each exit.

    Raises:
        InputError: a policy for another number of exits, no images, one class, or NaN logits.
    """
    policy.check_exits(len(logits))
    policy.check_exits(len(exit_macs))
    confidences = torch.stack([policy.confidence(k, x) for k, x in enumerate(logits)])
    stops = torch.stack([policy.stops(k, x) for k, x in enumerate(logits)])
    exit_index = stops.int().argmax(0)  # the first True; the last exit's row is all True
    predictions = torch.stack([x.argmax(1) for x in logits])
    chosen = exit_index.unsqueeze(0)
    macs = torch.tensor(list(exit_macs), device=exit_index.device)[exit_index]
    return Simulation(exit_index, predictions.gather(0, chosen)[0], confidences.gather(0, chosen)[0], macs)
