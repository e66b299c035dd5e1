"""What exits cost, as numbers, and multiply-adds as people write them."""
import re
from dataclasses import dataclass
from typing import Tuple, Union

from ..errors import InputError


@dataclass(frozen=True)
class ExitCosts:
    """Costs of a network's exits, shallow to deep.

    Everything that must have run for that exit's answer counts, the heads of earlier exits included.

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


_SUFFIXES = {'': 1., 'K': 1e3, 'M': 1e6, 'G': 1e9}


def parse_macs(text: Union[str, float]) -> float:
    """Multiply-adds from '30M', '0.03G', '3e7' or a number.

    >>> parse_macs('30M')
    30000000.0

    Raises:
        InputError: not a positive number.
    """
    match = re.fullmatch(r'\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([kKmMgG]?)\s*', str(text))
    try:
        value = float(match[1]) * _SUFFIXES[match[2].upper()]
    except (TypeError, ValueError):
        value = 0.
    if not 0. < value < float('inf'):
        raise InputError(f"'{text}' is not a number of MACs: write it like 30M or 3e7")
    return value


def parse_milliseconds(text: Union[str, float]) -> float:
    """Milliseconds from '3ms', '0.5 ms' or a number.

    >>> parse_milliseconds('3ms')
    3.0

    Raises:
        InputError: not a positive number.
    """
    match = re.fullmatch(r'\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*(?:ms)?\s*', str(text))
    try:
        value = float(match[1])
    except (TypeError, ValueError):
        value = 0.
    if not 0. < value < float('inf'):
        raise InputError(f"'{text}' is not a number of milliseconds: write it like 3ms")
    return value


def format_macs(macs: float) -> str:
    """Multiply-adds in millions, as '33.58 M'."""
    return f'{macs / 1e6:.2f} M'
