"""Stopping by agreement: an image leaves when exits in a row answer alike; no threshold, and no probabilities.

Paper: `BERT Loses Patience: Fast and Robust Inference with Early Exit`, Zhou et al., NeurIPS 2020, section 3 -
https://arxiv.org/abs/2006.04152
"""
from dataclasses import dataclass
from typing import Any, Optional, Tuple

import numpy as np

from ..errors import InputError
from .policy import Decision, as_array, confidence, like


@dataclass(frozen=True)
class Agreement:
    """A `StoppingRule`: an image leaves once `patience` exits, one after the other, repeat the answer before theirs.

    Attributes:
        num_exits: Exits of the network.
        patience: From 1, where two exits agree, to num_exits - 1, where all do.

    Raises:
        InputError: another patience.
    """

    num_exits: int
    patience: int = 1

    def __post_init__(self):
        if not 1 <= self.patience < self.num_exits:
            raise InputError(f'a patience of {self.patience} with {self.num_exits} exits: give a number from 1 to '
                             f'{self.num_exits - 1}')

    @property
    def exits_in_use(self) -> Tuple[int, ...]:
        """See `StoppingRule`; all, though none leaves at the first exits."""
        return tuple(range(self.num_exits))

    def decide(self, exit_index: int, logits: Any, memory: Optional[Any] = None) -> Decision:
        """See `StoppingRule`; the memory holds each image's answer and how often it was repeated, int64 (B, 2)."""
        values = as_array(logits)
        answer, repeats = values.argmax(1), np.zeros(len(values), np.int64)
        if memory is not None:
            last = as_array(memory)
            repeats = np.where(answer == last[:, 0], last[:, 1] + 1, 0)
        stops = repeats >= (0 if exit_index == self.num_exits - 1 else self.patience)
        known = np.stack([answer, repeats], 1)
        confidences = confidence(logits)
        if isinstance(logits, np.ndarray):
            return Decision(confidences, stops, known)
        return Decision(confidences, like(logits, stops).bool(), like(logits, known).long())
