"""Costs of exits as numbers, and multiply-adds and milliseconds as people write them."""
import re
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Optional, Sequence, Tuple, Union

import numpy as np

from ..errors import InputError


@dataclass(frozen=True)
class ExitCosts:
    """Costs of a network's exits, shallow to deep.

    The cost of an exit is cumulative: all that runs up to and including it, with the heads of earlier exits.

    Attributes:
        macs: Multiply-adds of convolutions and linear layers for one image, cumulative.
        params: Parameters, cumulative.
        input_size: (C, H, W) of the image.
    """

    macs: Tuple[int, ...]
    params: Tuple[int, ...]
    input_size: Tuple[int, int, int]

    def deepest_within(self, budget: float) -> int:
        """Index of the deepest exit that costs at most `budget` MACs.

        Raises:
            InputError: the budget is not a positive number or is below the cheapest exit.
        """
        if not budget >= self.macs[0]:
            raise InputError(
                f'a budget of {format_macs(budget)} MACs is below the first exit, which needs '
                f'{format_macs(self.macs[0])}: give at least that')
        return max(k for k, macs in enumerate(self.macs) if macs <= budget)


@dataclass(frozen=True)
class StageCosts:
    """What an image costs, stage by stage: all stages up to its exit, and the heads that were evaluated on the way.

    Attributes:
        stages: The cost of each stage.
        heads: The cost of each head.
        unit: 'MACs' or 'ms'.
        measure: Gives the milliseconds of a policy on this machine, measured; None if they cannot be.

    Raises:
        InputError: not one cost of 0 or more for each stage and head, the first together above 0.
    """

    stages: Tuple[float, ...]
    heads: Tuple[float, ...]
    unit: str = 'ms'
    measure: Optional[Callable[[Any], float]] = field(default=None, compare=False, repr=False)

    def __post_init__(self):
        stages, heads = np.asarray(self.stages, float), np.asarray(self.heads, float)
        if not (stages.ndim == 1 and len(stages) and stages.shape == heads.shape
                and np.isfinite([stages, heads]).all() and min(stages.min(), heads.min()) >= 0.
                and stages[0] + heads[0] > 0. and self.unit in ('MACs', 'ms')):
            raise InputError(f'costs {self.stages} of stages and {self.heads} of heads in {self.unit}: give a number '
                             'of 0 or more for each stage and each head, in MACs or ms')

    @classmethod
    def of_macs(cls, exit_macs: Sequence[int]) -> 'StageCosts':
        """MACs, of which heads count as part of their stage, whether they are evaluated or not."""
        return cls(tuple(map(float, np.diff((0, *exit_macs)))), (0.,) * len(exit_macs), 'MACs')

    def of_exits(self, exits: Sequence[int]) -> np.ndarray:
        """Cost of an image that leaves at each of these exits, rising, if only their heads are evaluated; float64."""
        index = list(exits)
        return np.cumsum(self.stages)[index] + np.cumsum(np.asarray(self.heads)[index])

    @property
    def cheapest(self) -> float:
        """Cost of an image if all leave at the exit that is reached first; a head may cost more than the next stage."""
        return min(float(self.of_exits((k,))[0]) for k in range(len(self.stages)))

    @property
    def full(self) -> float:
        """Cost of an image if none leaves early."""
        return float(self.of_exits((len(self.stages) - 1,))[0])

    def format(self, cost: float) -> str:
        """As people write it: '33.58 M MACs' or '2.100 ms'."""
        return f'{format_macs(cost)} MACs' if self.unit == 'MACs' else f'{cost:.3f} ms'


def parse_macs(text: Union[str, float]) -> float:
    """Multiply-adds from '30M', '0.03G', '3e7' or a number of at least 1,000.

    >>> parse_macs('30M')
    30000000.0

    Raises:
        InputError: not such a number.
    """
    macs = _parse(text, {'': 1., 'k': 1e3, 'm': 1e6, 'g': 1e9}, 'MACs: write it like 30M or 3e7')
    if macs < 1000.:
        raise InputError(f"'{text}' MACs are less than any network needs: did you mean {text}M?")
    return macs


def parse_milliseconds(text: Union[str, float]) -> float:
    """Milliseconds from '3ms', '0.5 ms' or a number.

    >>> parse_milliseconds('3ms')
    3.0

    Raises:
        InputError: not a positive number.
    """
    return _parse(text, {'': 1., 'ms': 1.}, 'milliseconds: write it like 3ms')


def parse_latency(text: Union[str, float], full: float) -> float:
    """Milliseconds from '3ms' or a number, or from a share of the full network's `full` milliseconds, like '50%'.

    >>> parse_latency('50%', full=8.)
    4.0

    Raises:
        InputError: not a positive number.
    """
    return _parse(text, {'': 1., 'ms': 1., '%': full / 100.}, "milliseconds or a share: write it like 3ms or 50%")


def _parse(text: Union[str, float], units: Dict[str, float], hint: str) -> float:
    match = re.fullmatch(r'([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-z%]*)', str(text).strip().lower())
    number, unit = match.groups() if match else ('', '')
    try:
        value = float(number) * units[unit]
    except (ValueError, KeyError):
        value = 0.
    if not 0. < value < float('inf'):
        raise InputError(f"'{text}' is not a number of {hint}")
    return value


def format_macs(macs: float) -> str:
    """Multiply-adds in millions, as '33.58 M'."""
    return f'{macs / 1e6:.2f} M'
