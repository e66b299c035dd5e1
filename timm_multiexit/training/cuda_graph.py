"""A whole training step as one CUDA graph, so that a fast GPU does not wait for Python to launch small kernels.

Muon alone orthogonalises msfuse_cifar's 132 matrices one by one, with about 20 kernels each. A graph launches all
kernels of a step with one call; the learning rates, which the schedule changes, are tensors on the device.
"""
from itertools import cycle
from typing import Any, Callable, Dict, List, Sequence

import torch

STREAMS = 8
WARMUP_STEPS = 3


def split_groups(groups: Sequence[Dict[str, Any]], parts: int) -> List[Dict[str, Any]]:
    """Splits an optimizer's parameter groups into smaller ones of about equal work, for parallel streams.

    Muon orthogonalises matrix by matrix, each with about 20 kernels that fill a small part of a GPU. Groups of vectors
    stay whole: one kernel updates all of them.
    """
    split = []
    for group in groups:
        params = group['params']
        if all(p.ndim < 2 for p in params):
            split.append(dict(group))
            continue
        largest_first = sorted(params, key=lambda p: p.numel(), reverse=True)
        split += [{**group, 'params': part} for i in range(parts) if (part := largest_first[i::parts])]
    return split


class GraphedStep:
    """Forward, backward and update, captured once and replayed for every batch of the same shape.

    Construction restores weights, BN statistics and the optimizer's state after its warm-up steps.

    Args:
        compute: Maps images and targets to the loss and leaves the gradients; nothing in it may wait for the device.
        module: Holds the weights and buffers that a step changes.
        optimizer: A capturable one whose whole state starts at zero.
        images, targets: A batch of the shape of all later ones, on a CUDA device.
    """

    def __init__(
            self,
            compute: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
            module: torch.nn.Module,
            optimizer: torch.optim.Optimizer,
            images: torch.Tensor,
            targets: torch.Tensor,
    ):
        device = images.device
        self.compute = compute
        self.optimizer = optimizer
        self.images, self.targets = images.clone(), targets.clone()
        self.rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]
        self.groups = split_groups(
            [{**group, 'lr': rate} for group, rate in zip(optimizer.param_groups, self.rates)], STREAMS)
        self.streams = [torch.cuda.Stream(device) for _ in range(STREAMS)]

        kept = {id(t): (t, t.detach().clone()) for t in [*module.state_dict(keep_vars=True).values(), *self._state()]}
        warmup = torch.cuda.Stream(device)
        warmup.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warmup):
            for _ in range(WARMUP_STEPS):
                optimizer.zero_grad(set_to_none=True)
                self._step()
        torch.cuda.current_stream().wait_stream(warmup)
        with torch.no_grad():
            for tensor, value in kept.values():
                tensor.copy_(value)
            for tensor in self._state():
                if id(tensor) not in kept:
                    tensor.zero_()
        self.graph = torch.cuda.CUDAGraph()
        optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(self.graph):
            self.loss = self._step()

    def _state(self) -> List[torch.Tensor]:
        return [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]

    def _step(self) -> torch.Tensor:
        loss = self.compute(self.images, self.targets)
        main, groups = torch.cuda.current_stream(), self.optimizer.param_groups
        try:
            for group, stream in zip(self.groups, cycle(self.streams)):
                stream.wait_stream(main)
                with torch.cuda.stream(stream):
                    self.optimizer.param_groups = [group]
                    self.optimizer.step()
        finally:
            self.optimizer.param_groups = groups
        for stream in self.streams:
            main.wait_stream(stream)
        return loss.detach()

    def __call__(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """One step on a batch of the captured shape, at the optimizer's current learning rates; returns the loss."""
        self.images.copy_(images)
        self.targets.copy_(targets)
        for rate, group in zip(self.rates, self.optimizer.param_groups):
            rate.fill_(group['lr'])
        self.graph.replay()
        return self.loss.clone()
