"""The PyTorch engine: any device."""
from typing import List, Optional, Sequence, Tuple, Union

import numpy as np
import torch

from ..models import MultiExitNet
from ..models._fold import fold

State = List[torch.Tensor]


class TorchEngine:
    """Runs segments with PyTorch, BN folded, channels last; see `engine.Engine`.

    One thread calls it at a time (`workers` is 1); PyTorch's own threads share the work of each operation.

    Args:
        model: The network; it is copied.
        device: Where to run; None for where the network is.
        dtype: float32, or bfloat16 where the processor has it.
    """

    name = 'torch'
    workers = 1
    image_size: Optional[Tuple[int, int]] = None

    def __init__(
            self,
            model: MultiExitNet,
            device: Optional[Union[str, torch.device]] = None,
            dtype: torch.dtype = torch.float32,
    ):
        net = fold(model).to(device=device, dtype=dtype).to(memory_format=torch.channels_last)
        self.num_exits, self.num_classes, self.in_chans = net.num_exits, net.num_classes, net.in_chans
        parameter = next(net.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.net = net

    def build(self, segments: Sequence[Tuple[int, int]]) -> None:
        """See `Engine`; segments are always ready."""

    def start(self, images: Union[torch.Tensor, np.ndarray]) -> State:
        images = torch.as_tensor(images)
        return [images.to(device=self.device, dtype=self.dtype, memory_format=torch.channels_last)]

    @torch.inference_mode()
    def run(self, first: int, last: int, state: State) -> Tuple[State, np.ndarray]:
        with torch.autocast(self.device.type, enabled=False):  # the engine's precision decides, or exits would move
            for k in range(first, last + 1):
                state = self.net.stages[k](state)
            return state, self.net.exits[last](state[-1]).float().cpu().numpy()

    @torch.inference_mode()
    def gather(self, pieces: Sequence[Tuple[State, Optional[np.ndarray]]]) -> State:
        chosen = [(state, None if rows is None else torch.from_numpy(rows).to(self.device)) for state, rows in pieces]
        if len(chosen) == 1:
            state, rows = chosen[0]
            return state if rows is None else [x.index_select(0, rows) for x in state]
        sizes = [len(state[0]) if rows is None else len(rows) for state, rows in chosen]
        gathered = []
        for parts in zip(*(state for state, _ in chosen)):
            out = torch.empty((sum(sizes), *parts[0].shape[1:]), dtype=parts[0].dtype, device=parts[0].device,
                              memory_format=torch.channels_last if parts[0].ndim == 4 else torch.contiguous_format)
            for target, x, (_, rows) in zip(out.split(sizes), parts, chosen):
                # Not index_select(out=...): it would not write into a channels-last part.
                target.copy_(x if rows is None else x.index_select(0, rows))
            gathered.append(out)
        return gathered
