"""When to stop: the contract of a stopping rule, confidence, and thresholds per exit, the rule of this package.

Whoever runs a network under a rule, or only replays logits, calls `decide` after each exit: runner, simulation, command
line and app. Nothing else compares a confidence with a threshold.
"""
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, NamedTuple, Optional, Protocol, Sequence, Tuple, Union

import numpy as np

from ..errors import InputError
from ..files import read_json, write_json
from .costs import format_macs

MEASURES = ('max_softmax', 'entropy', 'margin')

CALIBRATE_HINT = 'create one with timm-multiexit calibrate'

# A threshold that no confidence reaches: no image leaves at that exit. JSON has no infinity.
NEVER = 2.


class Decision(NamedTuple):
    """What a rule decides about the images at one exit.

    Attributes:
        confidence: float32 (B,).
        leaves: Which images leave here, bool (B,).
        memory: What the rule needs of these images at the next exit, an array (B, ...), or None.
    """

    confidence: Any
    leaves: Any
    memory: Optional[Any] = None


class StoppingRule(Protocol):
    """What a stopping rule must do. It is handed one exit at a time, shallow to deep."""

    @property
    def num_exits(self) -> int:
        """Exits of the networks that the rule is for."""
        ...

    @property
    def exits_in_use(self) -> Tuple[int, ...]:
        """Exits at which images may leave, rising, the last exit included; the other heads need not run."""
        ...

    def decide(self, exit_index: int, logits: Any, memory: Optional[Any] = None) -> Decision:
        """Which images leave at an exit in use; at the last exit all do.

        Args:
            exit_index: From 0.
            logits: That exit's, (B, num_classes), a NumPy array or a tensor; of the images that are still there.
            memory: The rows, for these images, of what the last decision handed on; None at the first exit in use.

        Returns:
            Arrays of the kind of `logits`.
        """
        ...


def as_array(values: Any) -> np.ndarray:
    """A NumPy array of an array or of a tensor on any device; a half-precision tensor becomes float32."""
    if isinstance(values, np.ndarray):
        return values
    values = values.detach().cpu()
    return (values.float() if values.is_floating_point() else values).numpy()


def confidence(logits: Any, measure: str = 'max_softmax', temperature: float = 1.) -> Any:
    """Confidence of each image, from 0 to 1; higher is more confident.

    Args:
        logits: (B, num_classes), a NumPy array or a tensor of any float type.
        measure: 'max_softmax' (the largest probability, MSDNet paper section 4), 'entropy' (1 - entropy / log C), or
            'margin' (largest minus second largest probability).
        temperature: Divides the logits.

    Returns:
        float32 (B,), of the kind of `logits` and on its device.

    Raises:
        InputError: unknown measure, an empty batch, a single class, or NaN logits.

    >>> confidence(np.log([[0.7, 0.2, 0.1]]), 'margin').round(3).tolist()
    [0.5]
    """
    if not isinstance(logits, np.ndarray):  # a tensor: NumPy computes, so that both kinds decide alike to the last bit
        value = confidence(as_array(logits), measure, temperature)
        return logits.detach().float().new_tensor(value)
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise InputError(f'confidence needs logits (images, classes) of two or more classes, got {tuple(logits.shape)}')
    if len(logits) == 0:
        raise InputError('confidence of an empty batch: give at least one image')
    x = logits.astype(np.float32) / np.float32(temperature)
    with np.errstate(invalid='ignore'):  # NaN is reported below
        p = np.exp(x - x.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
    if measure == 'max_softmax':
        value = p.max(1)
    elif measure == 'entropy':
        terms = np.where(p > 0., p * np.log(np.where(p > 0., p, 1.)), p)  # 0 log 0 is 0
        value = np.maximum(1. + terms.sum(1) / np.float32(math.log(p.shape[1])), 0.)  # rounding
    elif measure == 'margin':
        second, first = np.partition(p, -2, 1)[:, -2:].T
        value = first - second
    else:
        raise InputError(f"unknown confidence measure '{measure}': choose one of {', '.join(MEASURES)}")
    if np.isnan(value).any():
        raise InputError(
            f'{int(np.isnan(value).sum())} of {len(logits)} images have NaN or infinite logits: check the images and '
            'the weights')
    return value


def leaves(confidences: Any, threshold: Any) -> Any:
    """The stopping rule of thresholds: whether an image of this confidence leaves. Arrays broadcast."""
    return confidences >= threshold


def check_exits(rule: StoppingRule, num_exits: int) -> None:
    """Checks that a rule is for a network with that many exits.

    Raises:
        InputError: it is not.
    """
    if num_exits != rule.num_exits:
        raise InputError(
            f'a policy for {rule.num_exits} exits does not fit a network with {num_exits}: use the one stored with its '
            f'weights, or {CALIBRATE_HINT}')


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
        budget: Requested average MACs per image.
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
                values: Any = getattr(self, name)
                if name == 'exit_shares' and values is None:
                    continue
                object.__setattr__(self, name, tuple(map(float, values)))  # lists too: JSON has no tuples
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

    @classmethod
    def at_exit(cls, exit_index: int, num_exits: int, temperatures: Optional[Sequence[float]] = None) -> 'ExitPolicy':
        """Every image leaves at one exit, and no other head runs: anytime prediction.

        >>> ExitPolicy.at_exit(1, 3).thresholds
        (2.0, 0.0, 0.0)
        """
        thresholds = (NEVER,) * exit_index + (0.,) * (num_exits - exit_index)
        return cls(thresholds, tuple(temperatures or (1.,) * num_exits))

    @classmethod
    def at_confidence(cls, threshold: float, temperatures: Sequence[float]) -> 'ExitPolicy':
        """The first exit whose largest probability reaches `threshold` answers, else the last exit.

        Raises:
            InputError: `threshold` is not a probability above 0.
        """
        if not 0. < threshold <= 1.:
            raise InputError(f'a confidence of {threshold} is out of range: give a probability above 0 and up to 1')
        return cls((threshold,) * (len(temperatures) - 1) + (0.,), tuple(temperatures))

    @property
    def exits_in_use(self) -> Tuple[int, ...]:
        """See `StoppingRule`."""
        last = self.num_exits - 1
        used = [k for k, t in enumerate(self.thresholds) if t < NEVER or k == last]
        # After an exit where all images leave, nothing runs.
        first_for_all = next((i for i, k in enumerate(used) if self.thresholds[k] == 0.), len(used) - 1)
        return tuple(used[:first_for_all + 1])

    def confidence(self, exit_index: int, logits: Any) -> Any:
        """Confidence of each image at an exit, from its logits (B, num_classes); float32 (B,)."""
        return confidence(logits, self.measure, self.temperatures[exit_index])

    def decide(self, exit_index: int, logits: Any, memory: Optional[Any] = None) -> Decision:
        """See `StoppingRule`; thresholds need no memory."""
        value = self.confidence(exit_index, logits)
        last = exit_index == self.num_exits - 1
        return Decision(value, leaves(value, 0. if last else self.thresholds[exit_index]))

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
