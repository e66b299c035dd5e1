"""Faster training on CPUs with bfloat16 instructions: own kernels for the layers where PyTorch's leave them idle.

On maps of 2x2 to 32x32 pixels these are BN with ReLU, here one pass forward and one backward, and strided 3x3 and wide
1x1 convolutions, here matrix products. They are compiled at first use, which needs a C++ compiler and ninja. Results
differ from PyTorch's by the rounding of bfloat16.
"""
import functools
from pathlib import Path
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import nn

from ..errors import InputError

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
    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps):
        y, mean, inverse = _kernels().norm_relu_forward(x, weight, bias, running_mean, running_var, momentum, eps)
        ctx.save_for_backward(x, weight, bias, mean, inverse)
        return y

    @staticmethod
    def backward(ctx, gradient):
        return *_kernels().norm_relu_backward(gradient, *ctx.saved_tensors), None, None, None, None


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


class _FastNormAct(BatchNormAct2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = x.dtype == torch.bfloat16 and self.weight.dtype == torch.float32  # as autocast gives them
        if not (self.training and mixed and torch.is_grad_enabled()):
            return super().forward(x)
        self.num_batches_tracked.add_(1)
        return _NormReLU.apply(
            x, self.weight, self.bias, self.running_mean, self.running_var, self.momentum, self.eps)


class _FastConv(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not (self.training and torch.is_autocast_enabled('cpu') and torch.is_grad_enabled()):
            return super().forward(x)
        dtype = torch.get_autocast_dtype('cpu')
        with torch.autocast('cpu', enabled=False):
            return _ProductConv.apply(x.to(dtype), self.weight.to(dtype))


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
    return changed
