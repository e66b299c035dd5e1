"""Networks made ready for inference: BN folded into the convolutions, channels last, and run in segments.

A segment is a run of stages with the head of the last one. An engine holds a prepared copy of a network and runs any
segment of it, so that exits at which nobody may leave cost nothing, and the whole network as people run it who want no
early exits (all stages, the last head) is one segment like any other.
"""
import copy
from typing import Any, List, Optional, Sequence, Tuple, Union

import torch
from timm.layers import ConvNormAct
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .errors import InputError
from .extras import missing_packages, require_extra
from .models import MultiExitNet

ENGINES = ('auto', 'torch', 'onnx')


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """A copy in eval mode in which no BN follows a convolution: its scale and shift are the convolution's own.

    Folded are timm's ConvNormAct and a BN that stands right behind a convolution in an nn.Sequential. A BN that
    comes before its convolution, behind which an activation stands (DenseNet), stays. What the copy computes differs
    from the original by rounding only.
    """
    model = copy.deepcopy(model).eval()
    for module in list(model.modules()):
        if isinstance(module, ConvNormAct):
            if isinstance(module.bn, nn.BatchNorm2d):
                module.conv, module.bn = _fold(module.conv, module.bn)
        elif isinstance(module, nn.Sequential):
            names = list(module._modules)
            for first, second in zip(names[:-1], names[1:]):
                conv, norm = module._modules[first], module._modules[second]
                if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    module._modules[first], module._modules[second] = _fold(conv, norm)
    return model


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tuple[nn.Conv2d, nn.Module]:
    """The convolution with the BN in it, and what is left of the BN: the activation of timm's BatchNormAct2d."""
    return fuse_conv_bn_eval(conv, norm), getattr(norm, 'act', nn.Identity())


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
