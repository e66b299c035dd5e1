"""The outputs of all exits for one image, and which exit answers within a budget of MACs or time, or at a threshold.

The network runs once for each image; moving a control only picks another exit from the stored outputs.
"""
from dataclasses import dataclass
from typing import Optional, Tuple

import torch
from PIL import Image

from timm_multiexit import ExitCosts, ExitPolicy, InputError
from timm_multiexit.stopping.costs import format_macs
from timm_multiexit.stopping.simulate import simulate

BY_BUDGET, BY_TIME, BY_CONFIDENCE, BY_LOSS = 'budget', 'time', 'confidence', 'loss'


@dataclass(frozen=True)
class ExitOutputs:
    """What all exits of a network output for one image."""

    network: str  # 'arch.tag'
    logits: torch.Tensor  # float32 (num_exits, num_classes)
    labels: Tuple[str, ...]  # class names in the order of the logits
    costs: ExitCosts
    milliseconds: Tuple[float, ...]  # cumulative, to each exit on this machine
    temperatures: Tuple[float, ...]  # one per exit, stored with the weights; 1 if none are stored
    input_image: Image.Image  # at the network's input size, before normalization
    true_class: Optional[str] = None
    notes: Tuple[str, ...] = ()  # remarks about the input (downscaled, first frame of an animation, ...)
    example: Optional[int] = None  # position among the examples, for links; None for a visitor's own image

    @property
    def num_exits(self) -> int:
        return len(self.logits)

    def probabilities(self, calibrated: bool = True) -> torch.Tensor:
        """Class probabilities of every exit, float32 (num_exits, num_classes), with or without the temperatures."""
        if not calibrated:
            return self.logits.softmax(1)
        return (self.logits / torch.tensor(self.temperatures).unsqueeze(1)).softmax(1)


@dataclass(frozen=True)
class Answer:
    """Which exit answers, and why."""

    exit_index: int  # from 0
    mode: str  # BY_BUDGET, BY_TIME or BY_CONFIDENCE
    limit: float  # the budget in MACs, the time in milliseconds, or the confidence threshold
    calibrated: bool  # whether probabilities use the temperatures
    reason: str  # in words


def answer_within_budget(outputs: ExitOutputs, budget: float, calibrated: bool = True) -> Answer:
    """The deepest exit within a budget in MACs; `calibrated` only affects the probabilities shown.

    Raises:
        InputError: not a number, or below the cost of the first exit.
    """
    budget = _number(budget, 'budget')
    exit_index = outputs.costs.deepest_within(budget)
    reason = 'The budget covers the whole network' if exit_index == outputs.num_exits - 1 else (
        f'Exit {exit_index + 2} would need {format_macs(outputs.costs.macs[exit_index + 1])} MACs')
    return Answer(exit_index, BY_BUDGET, budget, calibrated, reason)


def answer_within_time(outputs: ExitOutputs, milliseconds: float, calibrated: bool = True) -> Answer:
    """The deepest exit that this machine reaches in time, evaluating every head on the way.

    Raises:
        InputError: not a number, or less than the first exit takes.
    """
    limit, times = _number(milliseconds, 'time'), outputs.milliseconds
    if not limit >= times[0]:
        raise InputError(f'the first exit takes {times[0]:.2f} ms on this machine: give at least that')
    exit_index = max(k for k, t in enumerate(times) if t <= limit)
    reason = 'There is time for the whole network' if exit_index == outputs.num_exits - 1 else (
        f'Exit {exit_index + 2} would take {times[exit_index + 1]:.1f} ms')
    return Answer(exit_index, BY_TIME, limit, calibrated, reason)


def answer_by_confidence(outputs: ExitOutputs, threshold: float, calibrated: bool = True) -> Answer:
    """The first exit whose largest probability reaches a threshold.

    Raises:
        InputError: the threshold is not a probability.
    """
    temperatures = outputs.temperatures if calibrated else (1.,) * outputs.num_exits
    threshold = _number(threshold, 'confidence')
    policy = ExitPolicy.at_confidence(threshold, temperatures)
    result = simulate(policy, outputs.logits.unsqueeze(1), outputs.costs.macs)
    exit_index = int(result.exit_index[0])
    reason = f'The first exit to reach {threshold:.0%} confidence' if result.confidence[0] >= threshold else (
        f'No exit reaches {threshold:.0%} confidence, so the last one answers')
    return Answer(exit_index, BY_CONFIDENCE, threshold, calibrated, reason)


def _number(value: object, what: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise InputError(f"'{value}' is not a {what}: give a number") from None


def describe(outputs: ExitOutputs, answer: Answer) -> dict:
    """The answer as plain values, for the API."""
    macs, top = outputs.costs.macs, outputs.probabilities(answer.calibrated).topk(min(5, len(outputs.labels)))
    exits = [
        dict(
            exit=k + 1, macs=macs[k], milliseconds=round(outputs.milliseconds[k], 3), ran=k <= answer.exit_index,
            top=[dict(label=outputs.labels[i], probability=round(p, 5)) for p, i in zip(values, indices)])
        for k, (values, indices) in enumerate(zip(top.values.tolist(), top.indices.tolist()))]
    chosen = exits[answer.exit_index]
    return dict(
        network=outputs.network, **chosen['top'][0], exit=chosen['exit'], num_exits=outputs.num_exits,
        reason=answer.reason, macs=chosen['macs'], share_of_full_cost=round(chosen['macs'] / macs[-1], 4),
        notes=list(outputs.notes), exits=exits)


def status_text(outputs: ExitOutputs, answer: Answer) -> str:
    """One sentence for screen readers."""
    k = answer.exit_index
    probability, index = outputs.probabilities(answer.calibrated)[k].max(0)
    label = outputs.labels[int(index)]
    saved = 1. - outputs.costs.macs[k] / outputs.costs.macs[-1]
    text = f'Exit {k + 1} of {outputs.num_exits} answers {spoken(label)} with {probability:.0%} confidence'
    if outputs.true_class is not None:
        text += ', correctly' if label == outputs.true_class else f'; the true class is {spoken(outputs.true_class)}'
    return f'{text}. {saved:.0%} of the compute saved.'


def spoken(label: str) -> str:
    """A class name for display: 'pickup truck' for 'pickup_truck'."""
    return label.replace('_', ' ')
