"""torch.export of each stage and head, for ExecuTorch, AOTInductor, Core ML and other users of exported programs."""
from typing import List, NamedTuple, Optional, Tuple

import torch
from torch import nn
from torch.export import Dim, ExportedProgram, export

from ..models import MultiExitNet
from ..models._fold import fold


class ExitPrograms(NamedTuple):
    """One exit: `stage(*state)` gives the next state, a tuple of tensors, whose last one `head` turns into logits."""

    stage: ExportedProgram
    head: ExportedProgram


class _Stage(nn.Module):
    def __init__(self, stage: nn.Module):
        super().__init__()
        self.stage = stage

    def forward(self, *state: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        return tuple(self.stage(list(state)))


@torch.no_grad()
def export_programs(model: MultiExitNet, image_size: Optional[Tuple[int, int]] = None) -> List[ExitPrograms]:
    """The network as exported programs, BN folded, with a dynamic batch.

    Args:
        model: The network; it is copied.
        image_size: (H, W); None for that in its pretrained cfg.

    Returns:
        One pair per exit. The first stage takes (images,), each later one the state that the stage before it gave.
        Temperatures and thresholds are those of the exit config; the head's logits are what a policy decides on.
    """
    net = fold(model).cpu().float()
    height, width = image_size or model.pretrained_cfg['input_size'][1:]
    state: Tuple[torch.Tensor, ...] = (torch.zeros(2, model.in_chans, height, width),)
    batch = {0: Dim('batch', min=1)}
    programs = []
    for stage, head in zip(net.stages, net.exits):
        wrapped = _Stage(stage)
        stage_program = export(wrapped, state, dynamic_shapes=((batch,) * len(state),))
        state = wrapped(*state)
        programs.append(ExitPrograms(stage_program, export(head, (state[-1],), dynamic_shapes=(batch,))))
    return programs
