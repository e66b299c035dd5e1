"""When to stop: a policy says, from one exit's logits, which images leave there. No network knows a policy."""
from dataclasses import dataclass
from typing import Optional, Tuple

import torch

from .errors import InputError

MEASURES = ('max_softmax', 'entropy', 'margin')


def confidence(logits: torch.Tensor, measure: str = 'max_softmax', temperature: float = 1.) -> torch.Tensor:
    """Confidence of each image, higher is surer, in 0 to 1.

    Args:
        logits: (B, num_classes), any float type.
        measure: 'max_softmax' (the largest probability, MSDNet paper section 4), 'entropy' (1 - entropy / log C), or
            'margin' (largest less second largest probability).
        temperature: Divides the logits.

    Returns:
        float32 (B,).

    Raises:
        InputError: unknown measure, a single class, or NaN logits.
    """
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise InputError(f'confidence needs logits (images, classes) of two or more classes, got {tuple(logits.shape)}')
    logits = logits.float() / temperature
    if torch.isnan(logits).any():
        raise InputError(f'{int(torch.isnan(logits).any(1).sum())} of {len(logits)} images have NaN logits')
    if measure == 'max_softmax':
        return logits.softmax(1).amax(1)
    if measure == 'entropy':
        log_p = logits.log_softmax(1)
        return 1. + (log_p.exp() * log_p).sum(1) / torch.log(torch.tensor(float(logits.shape[1])))
    if measure == 'margin':
        top = logits.softmax(1).topk(2, 1).values
        return top[:, 0] - top[:, 1]
    raise InputError(f"unknown confidence measure '{measure}': choose one of {', '.join(MEASURES)}")


@dataclass(frozen=True)
class ExitPolicy:
    """Thresholds per exit, and what they gave on the validation images.

    Attributes:
        thresholds: One per exit; an image leaves at the first exit whose confidence reaches it. The last is 0.
        temperatures: One per exit; divides that exit's logits before the confidence is measured.
        measure: Confidence measure, see `confidence`.
        budget: Average MACs per image that was asked for.
        expected_macs: Average MACs per image on the validation images.
        expected_accuracy: Top-1 accuracy on the validation images, in percent.
        exit_shares: Share of the validation images that leave at each exit.
        method: How the thresholds were found.
    """

    thresholds: Tuple[float, ...]
    temperatures: Tuple[float, ...]
    measure: str = 'max_softmax'
    budget: Optional[float] = None
    expected_macs: Optional[float] = None
    expected_accuracy: Optional[float] = None
    exit_shares: Optional[Tuple[float, ...]] = None
    method: str = ''

    def confidence(self, exit_index: int, logits: torch.Tensor) -> torch.Tensor:
        """Confidence of each image at an exit, from its logits (B, num_classes); float32 (B,)."""
        return confidence(logits, self.measure, self.temperatures[exit_index])

    def stops(self, exit_index: int, logits: torch.Tensor) -> torch.Tensor:
        """Which images leave at an exit, bool (B,); at the last exit all do."""
        if exit_index == len(self.thresholds) - 1:
            return torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        return self.confidence(exit_index, logits) >= self.thresholds[exit_index]
