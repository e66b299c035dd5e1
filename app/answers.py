"""What a network said about one image, exit by exit, and which exit answers under a budget or a confidence threshold.

All exits have run once when a `Reading` exists. Everything here only reads it again; no model is called.
"""
from dataclasses import dataclass
from typing import List, Optional, Tuple

import torch
from PIL import Image

from timm_multiexit.errors import InputError
from timm_multiexit.stopping.costs import ExitCosts, format_macs
from timm_multiexit.stopping.policy import ExitPolicy

BY_BUDGET, BY_CONFIDENCE = 'budget', 'confidence'


@dataclass(frozen=True)
class Reading:
    """One image as all exits of a network saw it.

    Attributes:
        network: Its name, 'arch.tag'.
        logits: float32 (num_exits, num_classes).
        labels: Class names in the order of the logits.
        costs: Costs of the exits for one image.
        milliseconds: Until each exit has answered, cumulative, measured on this machine.
        temperatures: One per exit, stored with the weights; 1 where none are stored.
        seen: The image at the size at which the network saw it, before normalization.
        true_class: Name of the right class, if it is known.
        notes: What a reader should know about the answer (the photo was shrunk, ...).
        example: Position among the examples, for links; None for a visitor's own image.
    """

    network: str
    logits: torch.Tensor
    labels: Tuple[str, ...]
    costs: ExitCosts
    milliseconds: Tuple[float, ...]
    temperatures: Tuple[float, ...]
    seen: Image.Image
    true_class: Optional[str] = None
    notes: Tuple[str, ...] = ()
    example: Optional[int] = None

    @property
    def num_exits(self) -> int:
        return len(self.logits)

    def probabilities(self, calibrated: bool = True) -> torch.Tensor:
        """Class probabilities of every exit, float32 (num_exits, num_classes); calibrated by the temperatures."""
        if not calibrated:
            return self.logits.softmax(1)
        return (self.logits / torch.tensor(self.temperatures).unsqueeze(1)).softmax(1)

    def top_classes(self, count: int, calibrated: bool = True) -> List[int]:
        """Classes worth following from exit to exit: the largest probability that each reaches anywhere decides."""
        best = self.probabilities(calibrated).amax(0)
        return best.topk(min(count, len(best))).indices.tolist()


@dataclass(frozen=True)
class Answer:
    """Which exit answers, and why that one.

    Attributes:
        exit_index: From 0.
        mode: 'budget' or 'confidence'.
        limit: The budget in MACs, or the confidence.
        calibrated: Whether probabilities are divided by the temperatures first.
        reason: In words.
    """

    exit_index: int
    mode: str
    limit: float
    calibrated: bool
    reason: str


def answer_within_budget(reading: Reading, budget: float, calibrated: bool = True) -> Answer:
    """The deepest exit that a budget allows (anytime prediction).

    Args:
        reading: The image.
        budget: MACs for this image.
        calibrated: Only kept for showing; the choice does not depend on it.

    Raises:
        InputError: no number, or below the first exit.
    """
    exit_index = reading.costs.deepest_within(_number(budget, 'budget'))
    if exit_index == reading.num_exits - 1:
        reason = 'the budget pays for the whole network'
    else:
        reason = f'exit {exit_index + 2} would need {format_macs(reading.costs.macs[exit_index + 1])} MACs'
    return Answer(exit_index, BY_BUDGET, budget, calibrated, reason)


def answer_by_confidence(reading: Reading, threshold: float, calibrated: bool = True) -> Answer:
    """The first exit whose largest probability reaches a threshold.

    Raises:
        InputError: no probability.
    """
    if not 0. < _number(threshold, 'confidence') <= 1.:
        raise InputError(f'a confidence of {threshold} cannot be asked for: give a probability above 0 and up to 1')
    last = reading.num_exits - 1
    temperatures = reading.temperatures if calibrated else (1.,) * reading.num_exits
    policy = ExitPolicy((float(threshold),) * last + (0.,), temperatures)
    exit_index = next(k for k in range(last + 1) if bool(policy.stops(k, reading.logits[k:k + 1])))
    reached = float(reading.probabilities(calibrated)[exit_index].max()) >= threshold
    reason = f'the first exit that is at least {threshold:.0%} sure' if reached else (
        f'no exit is {threshold:.0%} sure, so the last one answers')
    return Answer(exit_index, BY_CONFIDENCE, float(threshold), calibrated, reason)


def _number(value: object, what: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise InputError(f"'{value}' is not a {what}: give a number") from None


def describe(reading: Reading, answer: Answer) -> dict:
    """The answer as plain values, for programs."""
    probabilities = reading.probabilities(answer.calibrated)
    full = reading.costs.macs[-1]
    exits = []
    for k, row in enumerate(probabilities):
        top = row.topk(min(5, len(row)))
        exits.append(dict(
            exit=k + 1,
            macs=reading.costs.macs[k],
            milliseconds=round(reading.milliseconds[k], 3),
            ran=k <= answer.exit_index,
            top=[dict(label=reading.labels[i], probability=round(p, 5))
                 for p, i in zip(top.values.tolist(), top.indices.tolist())]))
    chosen = exits[answer.exit_index]
    return dict(
        network=reading.network,
        label=chosen['top'][0]['label'],
        probability=chosen['top'][0]['probability'],
        exit=chosen['exit'],
        num_exits=reading.num_exits,
        reason=answer.reason,
        macs=chosen['macs'],
        share_of_full_cost=round(chosen['macs'] / full, 4),
        notes=list(reading.notes),
        exits=exits)


def status_text(reading: Reading, answer: Answer) -> str:
    """One sentence for screen readers."""
    k = answer.exit_index
    probability, index = reading.probabilities(answer.calibrated)[k].max(0)
    saved = 1. - reading.costs.macs[k] / reading.costs.macs[-1]
    text = f'Exit {k + 1} of {reading.num_exits} answers {spoken(reading.labels[int(index)])}, {probability:.0%} sure'
    if reading.true_class is not None:
        text += ', which is right' if reading.labels[int(index)] == reading.true_class else (
            f', but it is {spoken(reading.true_class)}')
    return f'{text}. {saved:.0%} of the cost saved.'


def spoken(label: str) -> str:
    """A class name as people write it: 'pickup truck' for 'pickup_truck'."""
    return label.replace('_', ' ')
