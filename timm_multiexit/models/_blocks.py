"""Blocks shared by several architectures, where exits go in a plain chain, and the initialisation of weights."""
import math
from contextlib import contextmanager
from typing import Iterator, List, Sequence, Set, Type

import torch
from timm.layers import ConvNormAct
from torch import nn


class ConvStem(nn.Module):
    """3x3 convolution: [(B, in_chans, H, W)] to [(B, width, H, W)]."""

    def __init__(self, in_chans: int, width: int, **kwargs):
        super().__init__()
        self.conv = ConvNormAct(in_chans, width, 3, **kwargs)

    def forward(self, state: List[torch.Tensor]) -> List[torch.Tensor]:
        return [self.conv(state[-1])]


class Bottleneck(nn.Module):
    """1x1 convolution to a few channels, then a 3x3 convolution: B(in -> out, factor, stride) in the MSDNet paper.

    The inner width is `min(in_chs, factor * out_chs)`. Both convolutions are followed by BN and the activation.
    Maps (B, in_chs, H, W) to (B, out_chs, H / stride, W / stride).
    """

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            factor: int,
            stride: int = 1,
            act_layer: Type[nn.Module] = nn.ReLU,
            norm_layer: Type[nn.Module] = nn.BatchNorm2d,
            device=None,
            dtype=None,
    ):
        super().__init__()
        kwargs = dict(act_layer=act_layer, norm_layer=norm_layer, device=device, dtype=dtype)
        mid_chs = min(in_chs, factor * out_chs)
        self.conv1 = ConvNormAct(in_chs, mid_chs, 1, **kwargs)
        self.conv2 = ConvNormAct(mid_chs, out_chs, 3, stride=stride, **kwargs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv2(self.conv1(x))


class ConvChain(nn.Module):
    """A chain of 3x3 convolutions that outputs the map of each: [(B, in_chans, H, W)] to [(B, chs[i], H_i, W_i)].

    Args:
        in_chans: Channels of the image.
        chs: Channels after each convolution.
        strides: Stride of each convolution.
        first_out: Index of the first map to output.
        large_stem: The first is a 7x7 convolution of stride 2 with a bias, and max pooling, for large images.
    """

    def __init__(
            self,
            in_chans: int,
            chs: Sequence[int],
            strides: Sequence[int],
            first_out: int = 0,
            large_stem: bool = False,
            **kwargs,
    ):
        super().__init__()
        self.first_out = first_out
        self.convs = nn.ModuleList([
            ConvNormAct(i, o, 3, stride=stride, **kwargs) for i, o, stride in zip([in_chans, *chs[:-1]], chs, strides)])
        if large_stem:
            self.convs[0] = nn.Sequential(
                ConvNormAct(in_chans, chs[0], 7, stride=2, bias=True, **kwargs), nn.MaxPool2d(3, 2, 1))

    def forward(self, state: List[torch.Tensor]) -> List[torch.Tensor]:
        x = state[-1]
        maps: List[torch.Tensor] = []
        for conv in self.convs:
            x = conv(x)
            maps.append(x)
        return maps[self.first_out:]

    @torch.jit.ignore
    def keep_maps(self, kept: List[int]) -> List[int]:
        self.first_out = len(self.convs) + min(kept)
        return [-1]


def strided_convs(in_chs: int, width: int, **kwargs) -> nn.Module:
    """The exit of MSDNet and RANet: two strided 3x3 convolutions, (B, in_chs, H, W) to (B, width, H / 4, W / 4).

    The papers then pool 2x2, which is the whole map for 32x32 images; here pooling is global, for images of any size.
    """
    return nn.Sequential(
        ConvNormAct(in_chs, width, 3, stride=2, **kwargs),
        ConvNormAct(width, width, 3, stride=2, **kwargs),
    )


def chain_exits(num_resolutions: int, depth: int, exit_after: Sequence[int]) -> Set[int]:
    """The layers of a plain chain that exits follow, as in the MC (multi-classifier) baselines of the MSDNet paper.

    Args:
        num_resolutions: Resolutions of the chain.
        depth: Layers at each resolution.
        exit_after: Layers of each resolution that an exit follows, numbered from 1.

    Returns:
        Numbers of these layers in the whole chain, from 1; the last layer is always included.

    Raises:
        ValueError: no layers, or an exit after a layer that a resolution does not have.
    """
    if num_resolutions < 1 or depth < 1:
        raise ValueError(f'{num_resolutions} resolutions of {depth} layers: give at least one of each')
    if any(not 1 <= layer <= depth for layer in exit_after):
        raise ValueError(f'exits after layers {tuple(exit_after)} of each resolution: layers are numbered 1 to {depth}')
    return {r * depth + layer for r in range(num_resolutions) for layer in exit_after} | {num_resolutions * depth}


def init_weights(module: nn.Module) -> None:
    """Initialises a layer as MSDNet's Lua code does; use with `Module.apply`.

    Convolutions have a standard deviation of sqrt(2 / (k * k * out_channels / groups)), BN weight 1 and bias 0, linear
    layers bias 0 and PyTorch's default weights.
    """
    if isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, 0., math.sqrt(2. / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Batch normalisation as in train mode, whose running statistics stay as they are."""
    norms = [m for m in module.modules() if getattr(m, 'num_batches_tracked', None) is not None]
    kept = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.
    try:
        yield
    finally:  # checkpointing leaves the block by an error when it has all that it needs
        for norm, (momentum, count) in zip(norms, kept):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)
