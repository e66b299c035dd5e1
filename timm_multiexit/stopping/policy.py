"""When to stop: a policy says, from one exit's logits, which images leave there. No network knows a policy."""
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Tuple, Union

import torch

from ..errors import InputError
from ..files import read_json, write_json
from .costs import format_macs

MEASURES = ('max_softmax', 'entropy', 'margin')
# A threshold that no confidence reaches: no image leaves at that exit. JSON has no infinity.
NEVER = 2.


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
        InputError: unknown measure, an empty batch, a single class, or NaN logits.
    """
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise InputError(f'confidence needs logits (images, classes) of two or more classes, got {tuple(logits.shape)}')
    if len(logits) == 0:
        raise InputError('confidence of an empty batch: give at least one image')
    p = (logits.float() / temperature).softmax(1)
    if measure == 'max_softmax':
        value = p.amax(1)
    elif measure == 'entropy':
        value = 1. - torch.special.entr(p).sum(1) / math.log(p.shape[1])
    elif measure == 'margin':
        top = p.topk(2, 1).values
        value = top[:, 0] - top[:, 1]
    else:
        raise InputError(f"unknown confidence measure '{measure}': choose one of {', '.join(MEASURES)}")
    if torch.isnan(value).any():
        raise InputError(
            f'{int(torch.isnan(value).sum())} of {len(logits)} images have NaN or infinite logits: check the images '
            'and the weights')
    return value


def check_average_budget(budget: float, exit_macs: Sequence[float]) -> float:
    """A budget that policies can keep: from the cheapest exit to the full cost.

    Costs are printed in rounded form, so that a budget up to 0.1 % outside stands for the end itself.

    Args:
        budget: Average MACs per image.
        exit_macs: Cumulative MACs of each exit.

    Returns:
        The budget, moved to the nearest end if it lies that little outside.

    Raises:
        InputError: it is below the cheapest exit, above the full cost, or no number.
    """
    low, high = min(exit_macs), max(exit_macs)
    if not low * 0.999 <= budget <= high * 1.001:
        raise InputError(
            f'an average budget of {format_macs(budget)} MACs cannot be kept: choose one from {format_macs(low)} (all '
            f'images leave at the first exit) to {format_macs(high)} (none leaves early)')
    return float(min(max(budget, low), high))


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

    Raises:
        InputError: values that cannot be a policy.
    """

    thresholds: Tuple[float, ...]
    temperatures: Tuple[float, ...]
    measure: str = 'max_softmax'
    budget: Optional[float] = None
    expected_macs: Optional[float] = None
    expected_accuracy: Optional[float] = None
    exit_shares: Optional[Tuple[float, ...]] = None
    method: str = ''

    def __post_init__(self):
        try:
            for name in ('thresholds', 'temperatures', 'exit_shares'):
                values = getattr(self, name)
                if values is not None or name != 'exit_shares':  # lists too: JSON has no tuples
                    object.__setattr__(self, name, tuple(float(v) for v in values))
            for name in ('budget', 'expected_macs', 'expected_accuracy'):
                value = getattr(self, name)
                if value is not None:
                    object.__setattr__(self, name, float(value))
        except (TypeError, ValueError):
            raise InputError(f'policy with {name} {getattr(self, name)!r}: give numbers') from None
        count = len(self.thresholds)
        if count == 0 or not all(math.isfinite(t) and t >= 0. for t in self.thresholds):
            raise InputError(
                f'thresholds {self.thresholds}: give one number of 0 or more per exit, above 1 where no image leaves')
        if len(self.temperatures) != count or not all(math.isfinite(t) and t > 0. for t in self.temperatures):
            raise InputError(f'temperatures {self.temperatures}: give {count} numbers above 0, one per exit')
        if self.exit_shares is not None and len(self.exit_shares) != count:
            raise InputError(f'{len(self.exit_shares)} exit shares for {count} thresholds: give one per exit')
        if self.measure not in MEASURES:
            raise InputError(f"unknown confidence measure '{self.measure}': choose one of {', '.join(MEASURES)}")

    @property
    def num_exits(self) -> int:
        return len(self.thresholds)

    def check_exits(self, num_exits: int) -> None:
        """Checks that the policy is for a network with that many exits.

        Raises:
            InputError: it is not.
        """
        if num_exits != self.num_exits:
            raise InputError(
                f'a policy with {self.num_exits} thresholds does not fit a network with {num_exits} exits: use the one '
                'stored with its weights, or make one with timm-multiexit calibrate')

    def confidence(self, exit_index: int, logits: torch.Tensor) -> torch.Tensor:
        """Confidence of each image at an exit, from its logits (B, num_classes); float32 (B,)."""
        return confidence(logits, self.measure, self.temperatures[exit_index])

    def stops(self, exit_index: int, logits: torch.Tensor) -> torch.Tensor:
        """Which images leave at an exit, bool (B,); at the last exit all do."""
        if exit_index == len(self.thresholds) - 1:
            return torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        return self.confidence(exit_index, logits) >= self.thresholds[exit_index]

    def __str__(self) -> str:
        head = [f'stop by {self.measure}']
        if self.budget is not None:
            head.append(f'average budget {format_macs(self.budget)} MACs')
        if self.expected_macs is not None:
            head.append(f'on validation {format_macs(self.expected_macs)}')
        if self.expected_accuracy is not None:
            head.append(f'{self.expected_accuracy:.2f} % right')
        if self.method:
            head.append(f'found by {self.method}')
        rows = [', '.join(head), f"{'exit':>4} {'threshold':>9} {'temperature':>11}"]
        if self.exit_shares is not None:
            rows[1] += f" {'leave':>7}"
        for k, (threshold, temperature) in enumerate(zip(self.thresholds, self.temperatures)):
            if k == self.num_exits - 1:
                shown = 'all'
            else:
                shown = f'{threshold:.4f}' if threshold <= 1. else 'never'
            row = f'{k + 1:>4} {shown:>9} {temperature:>11.3f}'
            rows.append(row if self.exit_shares is None else f'{row} {self.exit_shares[k]:>7.1%}')
        return '\n'.join(rows)

    def to_dict(self) -> Dict[str, Any]:
        """Plain values for JSON; what is not known is left out."""
        values = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if v is not None and v != ''}

    @classmethod
    def from_dict(cls, values: Dict[str, Any]) -> 'ExitPolicy':
        """The policy of `to_dict`.

        Raises:
            InputError: not a policy: thresholds or temperatures missing, or unknown entries.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        if not isinstance(values, dict) or not {'thresholds', 'temperatures'} <= values.keys() <= set(known):
            got = ', '.join(map(str, values)) if isinstance(values, dict) else type(values).__name__
            raise InputError(f"not a policy, it holds {got or 'nothing'}: a policy has {', '.join(known)}")
        return cls(**values)

    def save(self, path: Union[str, Path]) -> None:
        """Writes the policy as JSON."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: Union[str, Path]) -> 'ExitPolicy':
        """Reads a policy written by `save`.

        Raises:
            InputError: no such file, or not a policy.
        """
        return cls.from_dict(read_json(path, 'policy'))
