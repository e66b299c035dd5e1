"""Cumulative multiply-adds (MACs) and parameters of each exit, counted with ptflops on any multi-exit network."""
from typing import Optional, Tuple

import torch
from ptflops import get_model_complexity_info
from torch import nn

from ..errors import InputError, first_line
from ..stopping.costs import ExitCosts
from ._base import MultiExitNet
from ._fold import merge_branches


class _Prefix(nn.Module):
    """A network up to and including one exit, with the earlier exits, which also run."""

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
    """Counts the multiply-adds and parameters up to and including each exit, for one image.

    Args:
        model: A multi-exit network; it stays in its mode. Of a backbone whose branches inference merges
            (`timm.utils.reparameterize_model`) the merged form is counted.
        input_size: (C, H, W); None for the size in the network's pretrained cfg.

    Returns:
        The costs; multiply-adds of convolutions and linear layers only, as in the literature.

    Raises:
        InputError: the network cannot run on that size.
    """
    if input_size is None:
        input_size = (model.in_chans, *model.pretrained_cfg['input_size'][1:])
    model = merge_branches(model)
    modes = {module: module.training for module in model.modules()}
    macs, params = [], []
    model.eval()  # of one image there are no batch statistics
    try:
        like = next(model.parameters())
        try:  # ptflops prints a traceback in place of raising
            with torch.no_grad():
                model.forward_exits(torch.zeros(1, *input_size, device=like.device, dtype=like.dtype))
        except InputError:
            raise
        except Exception as error:
            raise InputError(f'{type(model).__name__} does not run on images of size {tuple(input_size)}: '
                             f'{first_line(error)}') from error
        for k in range(model.num_exits):
            # The other backend of ptflops counts BN and activations too.
            prefix = _Prefix(model, k)
            count = get_model_complexity_info(
                prefix, tuple(input_size), as_strings=False, print_per_layer_stat=False, verbose=False,
                backend='aten')
            macs.append(int(count[0]))
            params.append(sum(p.numel() for p in prefix.parameters()))  # ptflops leaves out those that are frozen
    finally:
        for module, mode in modes.items():
            module.training = mode
    return ExitCosts(tuple(macs), tuple(params), tuple(input_size))
