"""The contract of an engine, which runs a prepared network segment by segment, and the choice of one.

A segment is a run of stages with the head of the last one. Exits at which no image may leave cost nothing, and the
whole network without early exits (all stages, the last head) is one segment like any other.
"""
from typing import TYPE_CHECKING, Any, List, Optional, Protocol, Sequence, Tuple, Union

import numpy as np

from ..errors import InputError
from ..optional import missing_packages, require_extra

if TYPE_CHECKING:
    import torch

    from ..models import MultiExitNet

ENGINES = ('auto', 'torch', 'onnx')


class Engine(Protocol):
    """What an engine must do. Its state is its own affair: callers hand it from `run` to `gather` and `run`.

    Attributes:
        name: For reports.
        num_exits, num_classes, in_chans: Those of the network.
        image_size: (height, width) of the images that it takes; None for all that the network does.
        device, dtype: Where it runs and in which precision, a `torch.device` and a `torch.dtype`.
        workers: How many threads should call at once, each with images of its own.
    """

    name: str
    num_exits: int
    num_classes: int
    in_chans: int
    image_size: Optional[Tuple[int, int]]
    device: Any
    dtype: Any
    workers: int

    def build(self, segments: Sequence[Tuple[int, int]]) -> None:
        """Makes segments (first stage, last stage) ready to run."""
        ...

    def start(self, images: Any) -> List[Any]:
        """The state before the first stage, from images (B, C, H, W), a tensor or an array."""
        ...

    def run(self, first: int, last: int, state: List[Any]) -> Tuple[List[Any], np.ndarray]:
        """Runs stages `first` to `last` and the head of `last`.

        Returns:
            The state after stage `last`, and that exit's logits, float32 (B, num_classes).
        """
        ...

    def gather(self, pieces: Sequence[Tuple[List[Any], Optional[np.ndarray]]]) -> List[Any]:
        """One state made of rows of several.

        Args:
            pieces: States with the rows to take, int64 (n,), or None for all.
        """
        ...


def make_engine(
        model: 'MultiExitNet',
        engine: str = 'torch',
        device: 'Optional[Union[str, torch.device]]' = None,
        **kwargs,
) -> Engine:
    """An engine for a network.

    Args:
        model: The network; it is copied.
        engine: 'torch', 'onnx' (onnxruntime, CPU only; much faster there), or 'auto': onnx on a CPU if it is
            installed, else torch.
        device: Where to run; None for where the network is.
        **kwargs: Further arguments of that engine.

    Raises:
        InputError: unknown engine, not installed, or not for that device.
    """
    import torch
    if engine not in ENGINES:
        raise InputError(f"unknown engine '{engine}': choose one of {', '.join(ENGINES)}")
    if model.num_classes < 2:
        raise InputError(f'a network of {model.num_classes} classes has no confidence to stop on: give two or more')
    target = torch.device(device or next(model.parameters()).device)
    on_cpu = target.type == 'cpu'
    if engine == 'auto':
        engine = 'onnx' if on_cpu and not missing_packages('export') else 'torch'
    if engine == 'torch':
        from .torch_engine import TorchEngine
        return TorchEngine(model, device, **kwargs)
    require_extra('export', 'the onnx engine')
    if not on_cpu:
        raise InputError(f"the onnx engine runs on the CPU only, not on '{target}': use the torch engine there")
    from .onnx_engine import OnnxEngine
    return OnnxEngine(model, **kwargs)
