"""When to stop: the contract of a stopping rule, confidence, and thresholds per exit, the rule of this package.

Whoever runs a network under a rule, or only replays logits, calls `decide` after each exit: runner, simulation, command
line and app. Nothing else compares a score with a threshold.
"""
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, NamedTuple, Optional, Protocol, Sequence, Tuple, Union

import numpy as np

from ..errors import InputError
from ..files import read_json, write_json

MEASURES = ('max_softmax', 'entropy', 'margin')

CALIBRATE_HINT = 'run timm-multiexit calibrate --checkpoint WEIGHTS --data-dir DIR'

# A threshold that no score reaches, so that no image leaves, and one that every score does. JSON has no infinity.
NEVER = 1e9
ALWAYS = -1e9


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


def scores(logits: Any, measure: str = 'max_softmax', temperature: float = 1.) -> Any:
    """Score of each image: the log-odds of its confidence, which thresholds are compared with.

    Confidences of a network that is often correct crowd at 1, where float32 cannot tell them apart; log-odds can.

    Args:
        logits: (B, num_classes), a NumPy array or a tensor of any float type.
        measure: Confidence is 'max_softmax' (the largest probability, MSDNet paper section 4), 'entropy' (1 - entropy /
            log C), or 'margin' (largest minus second largest probability).
        temperature: Divides the logits.

    Returns:
        float32 (B,), of the kind of `logits` and on its device.

    Raises:
        InputError: unknown measure, an empty batch, a single class, or NaN logits.
    """
    if not isinstance(logits, np.ndarray):
        return like(logits, scores(as_array(logits), measure, temperature))
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise InputError(f'confidence needs logits (images, classes) of two or more classes, got {tuple(logits.shape)}')
    if len(logits) == 0:
        raise InputError('confidence of an empty batch: give at least one image')
    if measure not in MEASURES:
        raise InputError(f"unknown confidence measure '{measure}': choose one of {', '.join(MEASURES)}")
    x = logits.astype(np.float32) / np.float32(temperature)
    rows = np.arange(len(x))
    top = x.argmax(1)
    first = x[rows, top]
    with np.errstate(invalid='ignore', divide='ignore'):  # NaN is reported below; equal logits give a margin of 0
        x -= first[:, None]
        x[rows, top] = -np.inf
        second = x.max(1)  # the others are summed relative to it, so that nothing underflows
        value = -second - np.log(np.exp(x - second[:, None]).sum(1))
        if measure == 'margin':
            value = np.log1p(-np.exp(second)) - np.logaddexp(-value, second)
        elif measure == 'entropy':
            others = np.exp(x.astype(np.float64))
            total = others.sum(1)
            x[rows, top] = 0.
            entropy = np.log1p(total) - (others * x).sum(1) / (1. + total)
            doubt = (entropy / math.log(x.shape[1])).clip(max=1.)
            value = np.log1p(-doubt) - np.log(doubt)
    if np.isnan(value).any():
        raise InputError(
            f'{int(np.isnan(value).sum())} of {len(logits)} images have NaN or infinite logits: check the images and '
            'the weights')
    return value.clip(ALWAYS / 2, NEVER / 2).astype(np.float32)


def like(logits: Any, value: np.ndarray) -> Any:
    """A tensor where the logits are: NumPy computes, so that arrays and tensors are decided alike to the last bit."""
    return logits.detach().float().new_tensor(value)


def probability(score: Any) -> Any:
    """The confidence, from 0 to 1, of scores, an array or a number."""
    return np.tanh(score / 2) / 2 + 0.5


def log_odds(confidence: float) -> float:
    """The score of a confidence from 0 to 1; `probability` turned round."""
    return math.log(confidence / (1. - confidence)) if 0. < confidence < 1. else (NEVER if confidence else ALWAYS) / 2


def confidence(logits: Any, measure: str = 'max_softmax', temperature: float = 1.) -> Any:
    """Confidence of each image, from 0 to 1; arguments, result and errors as `scores`.

    >>> confidence(np.log([[0.7, 0.2, 0.1]]), 'margin').round(3).tolist()
    [0.5]
    """
    value = probability(scores(as_array(logits), measure, temperature))
    return value if isinstance(logits, np.ndarray) else like(logits, value)


def leaves(score: Any, threshold: Any) -> Any:
    """The stopping rule of thresholds: whether an image of this score leaves. Arrays broadcast."""
    return score >= threshold


def check_exits(rule: StoppingRule, num_exits: int) -> None:
    """Checks that a rule is for a network with that many exits.

    Raises:
        InputError: it is not.
    """
    if num_exits != rule.num_exits:
        raise InputError(
            f'a policy for {rule.num_exits} exits does not fit a network with {num_exits}: use the one stored with its '
            f'weights, or {CALIBRATE_HINT}')


@dataclass(frozen=True)
class ExitPolicy:
    """Thresholds per exit, and what they gave on the images that they were solved on.

    Attributes:
        thresholds: One per exit, compared with `scores` (log-odds of the confidence): an image leaves at the first exit
            whose score reaches it. NEVER where no image leaves, ALWAYS where all that are left do, as at the last.
        temperatures: One per exit; divides that exit's logits before the confidence is measured.
        measure: Confidence measure, see `scores`.
        expected_macs: Average MACs per image.
        expected_ms: Average milliseconds per image, where a profile was given.
        expected_accuracy: Top-1 accuracy in percent, where labels are known.
        exit_shares: Share of the images that leave at each exit.
        promise: What is guaranteed about it, in words; empty if nothing is.

    Raises:
        InputError: values that cannot be a policy.
    """

    thresholds: Tuple[float, ...]
    temperatures: Tuple[float, ...]
    measure: str = 'max_softmax'
    expected_macs: Optional[float] = None
    expected_ms: Optional[float] = None
    expected_accuracy: Optional[float] = None
    exit_shares: Optional[Tuple[float, ...]] = None
    promise: str = ''

    def __post_init__(self):
        try:
            for name in ('thresholds', 'temperatures', 'exit_shares'):
                values: Any = getattr(self, name)
                if name == 'exit_shares' and values is None:
                    continue
                object.__setattr__(self, name, tuple(map(float, values)))  # lists too: JSON has no tuples
            for name in ('expected_macs', 'expected_ms', 'expected_accuracy'):
                value = getattr(self, name)
                if value is not None:
                    object.__setattr__(self, name, float(value))
        except (TypeError, ValueError):
            raise InputError(f'policy with {name} {getattr(self, name)!r}: give numbers') from None
        count = len(self.thresholds)
        if count == 0 or not all(ALWAYS <= t <= NEVER for t in self.thresholds):
            raise InputError(
                f'thresholds {self.thresholds}: give one number per exit, the log-odds of a confidence, from '
                f'{ALWAYS:g} (all images leave) to {NEVER:g} (none leaves)')
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

        >>> ExitPolicy.at_exit(1, 3).exits_in_use
        (1,)
        """
        thresholds = (NEVER,) * exit_index + (ALWAYS,) * (num_exits - exit_index)
        return cls(thresholds, tuple(temperatures or (1.,) * num_exits))

    @classmethod
    def at_confidence(cls, confidence: float, temperatures: Sequence[float]) -> 'ExitPolicy':
        """The first exit whose largest probability reaches `confidence` answers, else the last exit.

        Raises:
            InputError: `confidence` is not a probability above 0.
        """
        if not 0. < confidence <= 1.:
            raise InputError(f'a confidence of {confidence} is out of range: give a probability above 0 and up to 1')
        return cls((log_odds(confidence),) * (len(temperatures) - 1) + (ALWAYS,), tuple(temperatures))

    @property
    def exits_in_use(self) -> Tuple[int, ...]:
        """See `StoppingRule`."""
        last = self.num_exits - 1
        used = [k for k, t in enumerate(self.thresholds) if t < NEVER or k == last]
        # After an exit where all images leave, nothing runs.
        first_for_all = next((i for i, k in enumerate(used) if self.thresholds[k] == ALWAYS), len(used) - 1)
        return tuple(used[:first_for_all + 1])

    def confidence_at(self, exit_index: int) -> float:
        """The confidence from which on images leave at an exit, from 0 (all do) to 1."""
        return float(probability(self.thresholds[exit_index]))

    def decide(self, exit_index: int, logits: Any, memory: Optional[Any] = None) -> Decision:
        """See `StoppingRule`; thresholds need no memory."""
        score = scores(as_array(logits), self.measure, self.temperatures[exit_index])
        stops = leaves(score, ALWAYS if exit_index == self.num_exits - 1 else self.thresholds[exit_index])
        if isinstance(logits, np.ndarray):
            return Decision(probability(score), stops)
        return Decision(like(logits, probability(score)), like(logits, stops).bool())

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
