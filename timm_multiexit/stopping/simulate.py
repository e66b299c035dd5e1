"""A stopping rule replayed on the logits of all exits: the decisions of a real early exit, without its savings."""
from dataclasses import dataclass
from typing import Any, Sequence, Tuple

import numpy as np

from .policy import StoppingRule, as_array, check_exits


@dataclass(frozen=True)
class Simulation:
    """What a stopping rule decided about images, in input order.

    Attributes:
        exit_index: Exit that answers, int64 (N,).
        prediction: Its class, int64 (N,).
        confidence: Its confidence, float32 (N,).
        macs: MACs spent on each image, int64 (N,).
    """

    exit_index: Any
    prediction: Any
    confidence: Any
    macs: Any

    @property
    def average_macs(self) -> float:
        return float(np.mean(np.asarray(self.macs), dtype=np.float64))

    def accuracy(self, targets: Any) -> float:
        """Top-1 accuracy in percent against targets, int64 (N,)."""
        return 100. * float((np.asarray(self.prediction) == np.asarray(targets)).mean())

    def exit_shares(self, num_exits: int) -> Tuple[float, ...]:
        """Share of the images that leave at each exit."""
        counts = np.bincount(np.asarray(self.exit_index), minlength=num_exits)
        return tuple((counts / len(self.exit_index)).tolist())


def simulate(rule: StoppingRule, logits: Any, exit_macs: Sequence[int]) -> Simulation:
    """Replays a stopping rule on logits of all exits.

    Args:
        rule: When to stop.
        logits: One (N, num_classes) per exit, a list or a stacked array; NumPy arrays or tensors.
        exit_macs: Cumulative MACs of each exit.

    Returns:
        NumPy arrays.

    Raises:
        InputError: a rule for another number of exits, no images, one class, or NaN logits.
    """
    for count in (len(logits), len(exit_macs)):
        check_exits(rule, count)
    images = len(logits[0])
    exit_index, prediction = np.zeros((2, images), np.int64)
    confidences = np.zeros(images, np.float32)
    present, memory = np.arange(images), None
    for k in rule.exits_in_use:
        rows = as_array(logits[k])[present]
        decision = rule.decide(k, rows, memory)
        here = present[decision.leaves]
        exit_index[here] = k
        prediction[here] = rows[decision.leaves].argmax(1)
        confidences[here] = decision.confidence[decision.leaves]
        stay = ~decision.leaves
        memory = None if decision.memory is None else decision.memory[stay]
        present = present[stay]
        if len(present) == 0:
            break
    return Simulation(exit_index, prediction, confidences, np.asarray(exit_macs, np.int64)[exit_index])
