"""The PyTorch engine."""
from typing import Any, List, Optional, Sequence, Tuple, Union

import torch

from ..models import MultiExitNet
from ..models._fold import fold_batch_norm


class TorchEngine:
    """Runs segments with PyTorch, on any device, channels last.

    One thread calls it at a time (`workers` is 1); PyTorch's own threads share the work of each operation.

    Args:
        model: The network; it is copied.
        device: Where to run; None for where the network is.
        dtype: float32, or bfloat16 where the processor has it.
        compile_backend: Compile each stage and head by torch.compile with this backend ('inductor' needs a C++ compiler
            and minutes at the first batch; on a CPU it gained nothing over PyTorch, on small images).
    """

    name = 'torch'
    workers = 1

    def __init__(
            self,
            model: MultiExitNet,
            device: Optional[Union[str, torch.device]] = None,
            dtype: torch.dtype = torch.float32,
            compile_backend: Optional[str] = None,
    ):
        net = fold_batch_norm(model).to(device=device, dtype=dtype, memory_format=torch.channels_last)
        self.num_exits, self.num_classes, self.in_chans = net.num_exits, net.num_classes, net.in_chans
        parameter = next(net.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.stages: List[Any] = list(net.stages)
        self.heads: List[Any] = list(net.exits)
        if compile_backend:
            self.stages = [torch.compile(m, backend=compile_backend, dynamic=True) for m in self.stages]
            self.heads = [torch.compile(m, backend=compile_backend, dynamic=True) for m in self.heads]

    def build(self, segments: Sequence[Tuple[int, int]]) -> None:
        """Makes segments ready to run; here they always are."""

    def start(self, images: torch.Tensor) -> List[torch.Tensor]:
        """The state before the first stage, from images (B, C, H, W)."""
        return [images.to(device=self.device, dtype=self.dtype, memory_format=torch.channels_last)]

    def run(self, first: int, last: int, state: List[torch.Tensor]) -> Tuple[List[torch.Tensor], torch.Tensor]:
        """Runs stages `first` to `last` and the head of `last`.

        Returns:
            The state after stage `last`, and that exit's logits, float32 (B, num_classes).
        """
        for k in range(first, last + 1):
            state = self.stages[k](state)
        return state, self.heads[last](state[-1]).float()

    def gather(self, pieces: Sequence[Tuple[List[torch.Tensor], Optional[torch.Tensor]]]) -> List[torch.Tensor]:
        """One state of rows of several.

        Args:
            pieces: States with the rows to take, int64 (n,), or None for all.
        """
        if len(pieces) == 1:
            state, rows = pieces[0]
            return state if rows is None else [x.index_select(0, rows) for x in state]
        sizes = [len(state[0]) if rows is None else len(rows) for state, rows in pieces]
        gathered = []
        for parts in zip(*(state for state, _ in pieces)):
            out = torch.empty((sum(sizes), *parts[0].shape[1:]), dtype=parts[0].dtype, device=parts[0].device,
                              memory_format=torch.channels_last)
            for target, x, (_, rows) in zip(out.split(sizes), parts, pieces):
                # Not index_select(out=...): it would not write into a channels-last part.
                target.copy_(x if rows is None else x.index_select(0, rows))
            gathered.append(out)
        return gathered
