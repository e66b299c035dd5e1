"""Networks made ready for inference: BN folded into the convolutions, channels last, and run in segments.

A segment is a run of stages with the head of the last one. An engine holds a prepared copy of a network and runs any
segment of it, so that exits at which nobody may leave cost nothing, and the whole network as people run it who want no
early exits (all stages, the last head) is one segment like any other.
"""
from typing import Optional, Union

import torch

from ..errors import InputError
from ..models import MultiExitNet
from ..optional import missing_packages, require_extra
from .torch_engine import TorchEngine

ENGINES = ('auto', 'torch', 'onnx')


def make_engine(
        model: MultiExitNet,
        engine: str = 'torch',
        device: Optional[Union[str, torch.device]] = None,
        **kwargs,
):
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
    if engine not in ENGINES:
        raise InputError(f"unknown engine '{engine}': choose one of {', '.join(ENGINES)}")
    if model.num_classes < 2:
        raise InputError(f'a network of {model.num_classes} classes cannot say when it is sure: give two or more')
    on_cpu = torch.device(device or next(model.parameters()).device).type == 'cpu'
    if engine == 'auto':
        engine = 'onnx' if on_cpu and not missing_packages('export') else 'torch'
    if engine == 'torch':
        return TorchEngine(model, device, **kwargs)
    require_extra('export', 'the onnx engine')
    if not on_cpu:
        raise InputError(f"the onnx engine runs on the CPU only, not on '{device}': use the torch engine there")
    from .onnx_engine import OnnxEngine
    return OnnxEngine(model, **kwargs)
