"""What each exit costs: multiply-adds and parameters, cumulative, counted by ptflops on any multi-exit network."""
import re
from dataclasses import dataclass
from typing import Optional, Tuple, Union

import torch
from ptflops import get_model_complexity_info
from torch import nn

from .errors import InputError
from .models import MultiExitNet


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


class _Prefix(nn.Module):
    """A network up to one exit, with the earlier exits, which also run."""

    def __init__(self, model: MultiExitNet, last: int):
        super().__init__()
        self.stages = model.stages[:last + 1]
        self.exits = model.exits[:last + 1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = [x]
        for stage, head in zip(self.stages, self.exits):
            state = stage(state)
            logits = head(state[-1])
        return logits


def exit_costs(model: MultiExitNet, input_size: Optional[Tuple[int, int, int]] = None) -> ExitCosts:
    """Counts the costs of every exit.

    Args:
        model: A multi-exit network; its mode is kept.
        input_size: (C, H, W); None for the size in the network's pretrained cfg.

    Raises:
        InputError: the network cannot run on that size.
    """
    if input_size is None:
        input_size = (model.in_chans, *model.pretrained_cfg['input_size'][1:])
    training = model.training
    macs, params = [], []
    try:
        for k in range(model.num_exits):
            # The 'aten' backend counts convolutions and linear layers only, as the literature does.
            count = get_model_complexity_info(
                _Prefix(model, k), tuple(input_size), as_strings=False, print_per_layer_stat=False, verbose=False,
                backend='aten')
            if count[0] is None:
                raise InputError(f'{type(model).__name__} does not run on images of size {tuple(input_size)}')
            macs.append(int(count[0]))
            params.append(int(count[1]))
    finally:
        model.train(training)
    return ExitCosts(tuple(macs), tuple(params), tuple(input_size))


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


def format_macs(macs: float) -> str:
    """Multiply-adds in millions, as '33.58 M'."""
    return f'{macs / 1e6:.2f} M'
