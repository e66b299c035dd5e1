"""Faster training on CPUs with bfloat16 instructions: own kernels for the layers where PyTorch's leave them idle.

On maps of 2x2 to 32x32 pixels: BN with ReLU as one kernel each way; strided 3x3, wide 1x1 and DenseNet^MC's narrow 3x3
convolutions as matrix products; RANet's and DenseNet^MC's layers with fewer passes over their maps. The kernels are
compiled at first use, which needs a C++ compiler and ninja. Results differ from PyTorch's by the rounding of bfloat16.
"""
import functools
from pathlib import Path
from typing import Any, List, Sequence, Tuple

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import nn
from torch.autograd.function import once_differentiable

from ..errors import InputError, first_line
from ..models import densenet_mc, ranet

_FLAGS = '-O3 -std=c++20 -fopenmp -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16'.split()
_WIDE = 32  # input channels from which a 1x1 convolution is faster as a matrix product


def cpu_kernels_supported() -> bool:
    """Whether this processor has the instructions: AVX-512 with bfloat16."""
    has = torch.cpu.get_capabilities()
    return all(has.get(f'avx512_{name}', False) for name in ('f', 'bw', 'dq', 'vl', 'bf16'))


@functools.cache
def _kernels() -> Any:
    from torch.utils.cpp_extension import load
    source = Path(__file__).with_suffix('.cpp')
    try:
        return load('timm_multiexit_cpu_kernels', [str(source)], extra_cflags=_FLAGS)
    except (OSError, RuntimeError, ImportError) as error:
        raise InputError(f'the CPU kernels cannot be compiled ({first_line(error)}): install a C++ compiler and ninja, '
                         'or pass --no-cpu-kernels') from error


# Inputs in autocast's type, and autocast off in the forward pass.
_in_bfloat16 = torch.amp.custom_fwd(device_type='cpu', cast_inputs=torch.bfloat16)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) as (N * H * W, C): a row for each pixel."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _map(rows: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The inverse of `_rows`, for a map of the batch, height and width of `shape`."""
    return rows.view(shape[0], shape[2], shape[3], -1).permute(0, 3, 1, 2)


class _Concatenation(torch.autograd.Function):
    """`torch.cat(maps, 1)`."""

    @staticmethod
    @_in_bfloat16
    def forward(ctx, *maps):
        ctx.channels = [x.shape[1] for x in maps]
        return _kernels().concatenate(maps)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return gradient.split(ctx.channels, 1)


class _NormReLU(torch.autograd.Function):
    """x, and the ReLU of its BN. Using this x elsewhere lets the backward pass add up the two gradients of x."""

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps):
        y, mean, inverse = _kernels().norm_relu_forward(x, weight, bias, running_mean, running_var, momentum, eps)
        ctx.save_for_backward(x, weight, bias, mean, inverse)
        ctx.set_materialize_grads(False)
        return x.view_as(x), y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_x, gradient):
        return *_kernels().norm_relu_backward(gradient, *ctx.saved_tensors, grad_x), None, None, None, None


class _PointwiseConv(torch.autograd.Function):
    """x, and its 1x1 convolution as a matrix product. x as in `_NormReLU`."""

    @staticmethod
    @_in_bfloat16
    def forward(ctx, x, weight):
        ctx.set_materialize_grads(False)
        ctx.shape = x.shape
        rows, weight = _rows(x), weight.flatten(1)
        ctx.save_for_backward(rows, weight)
        return x.view_as(x), _map(torch.mm(rows, weight.t()), x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_x, gradient):
        rows, weight = ctx.saved_tensors
        gradient = _rows(gradient)
        if ctx.needs_input_grad[0]:
            total = torch.mm(gradient, weight) if grad_x is None else torch.addmm(_rows(grad_x), gradient, weight)
            grad_x = _map(total, ctx.shape)
        grad_weight = torch.mm(gradient.t(), rows)[:, :, None, None] if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight


class _StridedConv(torch.autograd.Function):
    """A 3x3 convolution with stride 2 and padding 1, as one matrix product."""

    @staticmethod
    @_in_bfloat16
    def forward(ctx, x, weight):
        n, _, height, width = ctx.shape = x.shape
        columns, weight = _kernels().gather_strided(x), weight.permute(0, 2, 3, 1).flatten(1)
        ctx.save_for_backward(columns, weight)
        return _map(torch.mm(columns, weight.t()), (n, -1, (height + 1) // 2, (width + 1) // 2))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        columns, weight = ctx.saved_tensors
        gradient = _rows(gradient)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = _kernels().scatter_strided(torch.mm(gradient, weight), *ctx.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.mm(gradient.t(), columns).view(len(weight), 3, 3, -1).permute(0, 3, 1, 2)
        return grad_x, grad_weight


class _NarrowConv(torch.autograd.Function):
    """A 3x3 convolution with padding 1 to a few channels: a matrix product to nine times as many, then the sum of each
    pixel's nine values.
    """

    @staticmethod
    @_in_bfloat16
    def forward(ctx, x, weight):
        n, channels, height, width = ctx.shape = x.shape
        rows, flipped = _rows(x), weight.flip(2, 3).permute(2, 3, 0, 1).reshape(-1, channels)
        ctx.save_for_backward(rows, flipped)
        return _kernels().scatter(torch.mm(rows, flipped.t()), n, len(weight), height, width)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        rows, flipped = ctx.saved_tensors
        # Dense first: gathering a slice of many channels reads a cache line for each value.
        gradient = _kernels().gather(gradient.contiguous(memory_format=torch.channels_last))
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = _map(torch.mm(gradient, flipped), ctx.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.mm(gradient.t(), rows).view(3, 3, -1, rows.shape[1]).permute(2, 3, 0, 1).flip(2, 3)
        return grad_x, grad_weight


class _Resize(torch.autograd.Function):
    """A bilinear resize with aligned corners."""

    @staticmethod
    @_in_bfloat16
    def forward(ctx, x, height, width):
        ctx.size = x.shape[-2:]
        return _kernels().resize_forward(x, height, width)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return _kernels().resize_backward(gradient, *ctx.size), None, None


def _resize_like(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return x if x.shape[-2:] == like.shape[-2:] else _Resize.apply(x, *like.shape[-2:])


def _fast(module: nn.Module) -> bool:
    in_bfloat16 = torch.is_autocast_enabled('cpu') and torch.get_autocast_dtype('cpu') == torch.bfloat16
    return module.training and in_bfloat16 and torch.is_grad_enabled()


class _FastNormAct(BatchNormAct2d):
    def supports(self, x: torch.Tensor) -> bool:
        mixed = x.dtype == torch.bfloat16 and self.weight.dtype == torch.float32  # as autocast gives them
        return self.training and mixed and torch.is_grad_enabled()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.with_input(x)[1] if self.supports(x) else super().forward(x)

    def with_input(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """x, to be used in its place, and the output."""
        self.num_batches_tracked.add_(1)
        return _NormReLU.apply(
            x, self.weight, self.bias, self.running_mean, self.running_var, self.momentum, self.eps)


class _FastConv(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not _fast(self):
            return super().forward(x)
        if self.kernel_size == (1, 1):
            return _PointwiseConv.apply(x, self.weight)[1]
        return _StridedConv.apply(x, self.weight)


class _FastDenseLayer(densenet_mc.DenseLayer):
    def forward(self, state: List[torch.Tensor]) -> List[torch.Tensor]:
        norm, x = self.conv.norm, state[-1]
        if not (isinstance(norm, _FastNormAct) and norm.supports(x)):
            return super().forward(state)
        x, y = norm.with_input(x)
        return [_Concatenation.apply(x, _NarrowConv.apply(y, self.conv.conv.weight))]


class _FastPlainBlock(ranet.PlainBlock):
    def forward_block(self, maps: List[torch.Tensor]) -> List[torch.Tensor]:
        if not _fast(self):
            return super().forward_block(maps)
        x = maps[0]
        for layer in self.layers:
            x, inner = _PointwiseConv.apply(x, layer.conv1.conv.weight)
            x = _Concatenation.apply(x, layer.conv2(layer.conv1.bn(inner)))
        return [x]


class _FastFusionBlock(ranet.FusionBlock):
    """The first convolutions of all layers on the lower map, a few channels each, are one matrix product."""

    def forward_block(self, maps: List[torch.Tensor]) -> List[torch.Tensor]:
        if not _fast(self):
            return super().forward_block(maps)
        x, low = maps[0], maps[1]
        weights = [layer.low.conv1.conv.weight for layer in self.layers]
        merged = torch.cat([F.pad(weight, (0, 0, 0, 0, 0, low.shape[1] - weight.shape[1])) for weight in weights])
        inner_lows = _PointwiseConv.apply(low, merged)[1].split([len(weight) for weight in weights], 1)
        before = x
        for layer, inner_low in zip(self.layers, inner_lows):
            before = x
            x, inner = _PointwiseConv.apply(x, layer.own.conv1.conv.weight)
            own = layer.own.conv2(layer.own.conv1.bn(inner))
            fused = layer.low.conv2(layer.low.conv1.bn(inner_low))
            x = _Concatenation.apply(_resize_like(x, own), _resize_like(fused, own), own)
        return self.end_block(before, x, _Concatenation.apply(x, _resize_like(self.end(maps[-1]), x)))


_FAST_BLOCKS = {
    densenet_mc.DenseLayer: _FastDenseLayer, ranet.PlainBlock: _FastPlainBlock, ranet.FusionBlock: _FastFusionBlock}


def _is_product(conv: nn.Conv2d) -> bool:
    if conv.groups > 1 or conv.bias is not None or conv.dilation != (1, 1):
        return False
    kind = (conv.kernel_size, conv.stride, conv.padding)
    wide = conv.in_channels >= _WIDE
    return kind == ((3, 3), (2, 2), (1, 1)) or (wide and kind == ((1, 1), (1, 1), (0, 0)))


def use_cpu_kernels(model: nn.Module) -> int:
    """Makes the layers that the kernels support use them when training under autocast to bfloat16.

    Parameters, their names, and the outputs in eval mode stay unchanged. TorchScript cannot compile the result, and in
    training, forward hooks inside the blocks of RANet and DenseNet^MC do not run.

    Args:
        model: The network; changed in place.

    Returns:
        The number of layers changed.

    Raises:
        InputError: this processor lacks the instructions, or there is no C++ compiler.
    """
    if not cpu_kernels_supported():
        raise InputError('the CPU kernels need a processor with AVX-512 and bfloat16: pass --no-cpu-kernels')
    _kernels()
    changed = 0
    for module in model.modules():
        if type(module) is BatchNormAct2d:
            usual = module.affine and module.track_running_stats and module.momentum is not None
            if usual and type(module.act) is nn.ReLU and type(module.drop) is nn.Identity:
                module.__class__ = _FastNormAct
                changed += 1
        elif type(module) is nn.Conv2d and _is_product(module):
            module.__class__ = _FastConv
            changed += 1
        elif type(module) in _FAST_BLOCKS:
            module.__class__ = _FAST_BLOCKS[type(module)]
            changed += 1
    return changed
