"""Faster training on CPUs with bfloat16 instructions: own kernels for the layers where PyTorch's leave them idle.

On maps of 2x2 to 32x32 pixels these are BN with ReLU, here one pass forward and one backward, strided 3x3 and wide 1x1
convolutions, here matrix products, and the layers of RANet and DenseNet^MC, here with fewer passes over their maps. The
kernels are compiled at first use, which needs a C++ compiler and ninja. Results differ from PyTorch's by the rounding
of bfloat16.
"""
import functools
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, List, Tuple

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import nn

from ..errors import InputError
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
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f'the CPU kernels cannot be compiled ({reason}): install a C++ compiler and ninja, or omit '
                         '--cpu-kernels') from error


class _NormReLU(torch.autograd.Function):
    """x, and the ReLU of its BN: the backward pass also adds the two gradients of x."""

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps):
        y, mean, inverse = _kernels().norm_relu_forward(x, weight, bias, running_mean, running_var, momentum, eps)
        ctx.save_for_backward(x, weight, bias, mean, inverse)
        ctx.set_materialize_grads(False)
        return x.view_as(x), y

    @staticmethod
    def backward(ctx, grad_x, gradient):
        return *_kernels().norm_relu_backward(gradient, *ctx.saved_tensors, grad_x), None, None, None, None


class _ProductConv(torch.autograd.Function):
    """A 3x3 convolution of stride 2 and padding 1, or a 1x1 convolution of stride 1, as one matrix product."""

    @staticmethod
    def forward(ctx, x, weight):
        n, _, height, width = x.shape
        ctx.strided, ctx.in_shape, ctx.weight_shape = weight.shape[-1] == 3, x.shape, weight.permute(0, 2, 3, 1).shape
        if ctx.strided:
            columns, height, width = _kernels().gather_strided(x), (height + 1) // 2, (width + 1) // 2
        else:
            columns = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
        weight = weight.permute(0, 2, 3, 1).flatten(1)
        ctx.save_for_backward(columns, weight)
        return torch.mm(columns, weight.t()).view(n, height, width, -1).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx, gradient):
        columns, weight = ctx.saved_tensors
        gradient = gradient.permute(0, 2, 3, 1).reshape(-1, len(weight))
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            n, channels, height, width = ctx.in_shape
            product = torch.mm(gradient, weight)
            if ctx.strided:
                grad_x = _kernels().scatter_strided(product, n, channels, height, width)
            else:
                grad_x = product.view(n, height, width, channels).permute(0, 3, 1, 2)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.mm(gradient.t(), columns).view(ctx.weight_shape).permute(0, 3, 1, 2)
        return grad_x, grad_weight


class _DenseProduct(torch.autograd.Function):
    """x, and its 1x1 convolution: the matrix product of the backward pass also adds the two gradients of x."""

    @staticmethod
    def forward(ctx, x, weight):
        n, channels, height, width = x.shape
        columns, weight = x.permute(0, 2, 3, 1).reshape(-1, channels), weight.flatten(1)
        ctx.save_for_backward(columns, weight)
        return x.view_as(x), torch.mm(columns, weight.t()).view(n, height, width, -1).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx, grad_x, gradient):
        columns, weight = ctx.saved_tensors
        n, channels, height, width = grad_x.shape
        grad_x, gradient = (g.permute(0, 2, 3, 1).flatten(0, 2) for g in (grad_x, gradient))
        total = torch.addmm(grad_x, gradient, weight).view(n, height, width, channels).permute(0, 3, 1, 2)
        return total, torch.mm(gradient.t(), columns)[:, :, None, None]


class _NarrowConv(torch.autograd.Function):
    """A 3x3 convolution of padding 1 to a few channels: a product to nine times as many, and their sum by position."""

    @staticmethod
    def forward(ctx, x, weight):
        n, channels, height, width = ctx.in_shape = x.shape
        columns = x.permute(0, 2, 3, 1).reshape(-1, channels)
        flipped = weight.flip(2, 3).permute(2, 3, 0, 1).reshape(-1, channels)
        ctx.save_for_backward(columns, flipped)
        return _kernels().scatter(torch.mm(columns, flipped.t()), n, len(weight), height, width)

    @staticmethod
    def backward(ctx, gradient):
        columns, flipped = ctx.saved_tensors
        n, channels, height, width = ctx.in_shape
        gradient = _kernels().gather(gradient.contiguous(memory_format=torch.channels_last))
        grad_x = torch.mm(gradient, flipped).view(n, height, width, channels).permute(0, 3, 1, 2)
        grad_weight = torch.mm(gradient.t(), columns).view(3, 3, -1, channels)
        return grad_x, grad_weight.permute(2, 3, 0, 1).flip(2, 3)


class _Resize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, height, width):
        ctx.size = x.shape[-2:]
        return _kernels().resize_forward(x, height, width)

    @staticmethod
    def backward(ctx, gradient):
        return _kernels().resize_backward(gradient, *ctx.size), None, None


def _fast(module: nn.Module) -> bool:
    return module.training and torch.is_autocast_enabled('cpu') and torch.is_grad_enabled()


@contextmanager
def _rounded(*tensors: torch.Tensor) -> Iterator[List[torch.Tensor]]:
    """The tensors in autocast's type, and autocast off."""
    dtype = torch.get_autocast_dtype('cpu')
    with torch.autocast('cpu', enabled=False):
        yield [tensor.to(dtype) for tensor in tensors]


def _resize_like(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if x.shape[-2:] == like.shape[-2:]:
        return x
    with _rounded(x) as tensors:
        return _Resize.apply(*tensors, *like.shape[-2:])


class _FastPlainBlock(ranet.PlainBlock):
    def forward_block(self, maps: List[torch.Tensor]) -> List[torch.Tensor]:
        if not _fast(self):
            return super().forward_block(maps)
        x = maps[0]
        for layer in self.layers:
            with _rounded(x, layer.conv1.conv.weight) as (x, weight):
                x, inner = _DenseProduct.apply(x, weight)
            x = torch.cat([x, layer.conv2(layer.conv1.bn(inner))], 1)
        return [x]


class _FastFusionBlock(ranet.FusionBlock):
    """The first convolutions of all layers on the lower map, a few channels each, are one matrix product."""

    def forward_block(self, maps: List[torch.Tensor]) -> List[torch.Tensor]:
        if not _fast(self):
            return super().forward_block(maps)
        x, low = maps[0], maps[1]
        weights = [layer.low.conv1.conv.weight for layer in self.layers]
        merged = torch.cat([F.pad(weight, (0, 0, 0, 0, 0, low.shape[1] - weight.shape[1])) for weight in weights])
        with _rounded(low, merged) as tensors:
            inner_lows = _ProductConv.apply(*tensors).split([len(weight) for weight in weights], 1)
        for layer, inner_low in zip(self.layers, inner_lows):
            before = x
            with _rounded(x, layer.own.conv1.conv.weight) as (x, weight):
                x, inner = _DenseProduct.apply(x, weight)
            own = layer.own.conv2(layer.own.conv1.bn(inner))
            fused = layer.low.conv2(layer.low.conv1.bn(inner_low))
            x = torch.cat([_resize_like(x, own), _resize_like(fused, own), own], 1)
        return self.end_block(before, x, maps[-1])


class _FastDenseLayer(densenet_mc.DenseLayer):
    def forward(self, state: List[torch.Tensor]) -> List[torch.Tensor]:
        norm, conv = self.conv.norm, self.conv.conv
        if not (_fast(self) and isinstance(norm, _FastNormAct)):
            return super().forward(state)
        with _rounded(state[-1], conv.weight) as (x, weight):
            x, y = norm.with_input(x)
            return [torch.cat([x, _NarrowConv.apply(y, weight)], 1)]


_FAST_BLOCKS = {
    densenet_mc.DenseLayer: _FastDenseLayer, ranet.PlainBlock: _FastPlainBlock, ranet.FusionBlock: _FastFusionBlock}


class _FastNormAct(BatchNormAct2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = x.dtype == torch.bfloat16 and self.weight.dtype == torch.float32  # as autocast gives them
        if not (self.training and mixed and torch.is_grad_enabled()):
            return super().forward(x)
        return self.with_input(x)[1]

    def with_input(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """x, to be used in its place, and the output."""
        self.num_batches_tracked.add_(1)
        return _NormReLU.apply(
            x, self.weight, self.bias, self.running_mean, self.running_var, self.momentum, self.eps)


class _FastConv(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not _fast(self):
            return super().forward(x)
        with _rounded(x, self.weight) as tensors:
            return _ProductConv.apply(*tensors)


def _is_product(conv: nn.Conv2d) -> bool:
    if conv.groups > 1 or conv.bias is not None or conv.dilation != (1, 1):
        return False
    kind = (conv.kernel_size, conv.stride, conv.padding)
    wide = conv.in_channels >= _WIDE
    return kind == ((3, 3), (2, 2), (1, 1)) or (wide and kind == ((1, 1), (1, 1), (0, 0)))


def use_cpu_kernels(model: nn.Module) -> int:
    """Makes the layers that the kernels support use them when training under autocast to bfloat16.

    Parameters, their names, and the network in eval mode stay unchanged.

    Args:
        model: The network; changed in place.

    Returns:
        The number of layers changed.

    Raises:
        InputError: this processor lacks the instructions, or there is no C++ compiler.
    """
    if not cpu_kernels_supported():
        raise InputError('the CPU kernels need a processor with AVX-512 and bfloat16: omit --cpu-kernels')
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
