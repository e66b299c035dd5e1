"""MSFuse: MSDNet with a fusion layer across scales and an efficient stem.

Paper: `Multi-Exit Resource-Efficient Neural Architecture for Image Classification with Optimized Fusion Block`,
Addad, Lechervy, Jurie, ICCV Workshops 2023 - https://hal.science/hal-04181149

The paper has no table of widths. The defaults are MSDNet's anytime schedule at twice its widths, with the finest scale
at half the image size, which gives the paper's cost ratios (15 % below MSDNet, 32 % below RANet). The paper does not
name the activation; the default is ReLU.
"""
from typing import Any, List, Sequence, Tuple

import torch
from timm.layers import ConvNormAct
from timm.models import generate_default_cfgs, register_model
from torch import nn

from ._base import build_network
from ._blocks import Bottleneck
from ._multiscale import MultiScaleNet
from ._pretrained import pretrained_cfgs

__all__ = ['MSFuse']


class Stem(nn.Module):
    """The first maps of all scales (section 2, "An efficient stem layer").

    Scale 1, at half the image size: 3x3 convolution, depthwise 3x3, 1x1, a shortcut from the first convolution (no
    activation after the addition), depthwise 3x3 with stride 2. Each coarser scale is a strided 3x3 convolution of the
    previous one. Maps [(B, in_chans, H, W)] to [(B, width * f_s, H / 2^s, W / 2^s) for the last out_scales scales s].
    """

    def __init__(self, in_chans: int, width: int, scale_factors: Sequence[int], out_scales: int, **kwargs):
        super().__init__()
        self.first_out = len(scale_factors) - out_scales
        self.conv1 = ConvNormAct(in_chans, width, 3, **kwargs)
        self.conv2 = ConvNormAct(width, width, 3, groups=width, **kwargs)
        self.conv3 = ConvNormAct(width, width, 1, **kwargs)
        chs = [width * f for f in scale_factors]
        self.conv4 = ConvNormAct(width, chs[0], 3, stride=2, groups=width, **kwargs)
        self.down = nn.ModuleList([ConvNormAct(a, b, 3, stride=2, **kwargs) for a, b in zip(chs[:-1], chs[1:])])

    def forward(self, state: List[torch.Tensor]) -> List[torch.Tensor]:
        x = self.conv1(state[-1])
        x = x + self.conv3(self.conv2(x))
        x = self.conv4(x)
        maps = [x]
        for down in self.down:
            x = down(x)
            maps.append(x)
        return maps[self.first_out:]

    @torch.jit.ignore
    def keep_maps(self, kept: List[int]) -> List[int]:
        self.first_out = len(self.down) + 1 + min(kept)
        return [-1]


class FusionLayer(nn.Module):
    """The paper's layer (section 2, "An improved fusion layer"): each scale reads this layer's output of the finer one.

    Finest scale: concat(x, B(x)). Any other: concat(x_s, B(y_{s-1}, stride 2), B(x_s)), where y_{s-1} is the *output*
    of scale s-1 in the same layer; MSDNet uses the previous layer's x_{s-1} there.

    Args:
        in_chs: Channels of each active scale, finest first.
        growth_chs: Channels that the layer adds to each active scale.
        factors: Bottleneck factor of each active scale; a bottleneck uses the factor of the scale that it reads.
        out_scales: Number of scales, coarsest last, that the layer outputs: those that a later layer still reads.
    """

    def __init__(
            self,
            in_chs: Sequence[int],
            growth_chs: Sequence[int],
            factors: Sequence[int],
            out_scales: int,
            **kwargs,
    ):
        super().__init__()
        self.first_out = len(in_chs) - out_scales
        self.out_chs = [c + g for c, g in zip(in_chs, growth_chs)]
        self.finest = Bottleneck(in_chs[0], growth_chs[0], factors[0], **kwargs)
        self.down = nn.ModuleList()
        self.own = nn.ModuleList()
        for s in range(1, len(in_chs)):
            half = growth_chs[s] // 2
            self.down.append(Bottleneck(self.out_chs[s - 1], half, factors[s - 1], stride=2, **kwargs))
            self.own.append(Bottleneck(in_chs[s], growth_chs[s] - half, factors[s], **kwargs))

    def forward(self, state: List[torch.Tensor]) -> List[torch.Tensor]:
        y = torch.cat([state[0], self.finest(state[0])], 1)
        maps = [y]
        for i, (down, own) in enumerate(zip(self.down, self.own)):
            x = state[i + 1]
            y = torch.cat([x, down(y), own(x)], 1)
            maps.append(y)
        return maps[self.first_out:]

    @torch.jit.ignore
    def keep_maps(self, kept: List[int]) -> List[int]:
        self.first_out = len(self.out_chs) + min(kept)
        return list(range(-len(self.out_chs), 0))


class MSFuse(MultiScaleNet):
    """MSFuse; for the arguments see `MultiScaleNet`."""

    stem_type = Stem
    layer_type = FusionLayer
    finest_reduction = 2

    def __init__(self, *, base_width: int = 32, growth: int = 12, **kwargs: Any):
        super().__init__(base_width=base_width, growth=growth, **kwargs)

    @staticmethod
    def held_scales(active: Sequence[int]) -> Tuple[int, ...]:
        """Each layer reads its active scales; the exits read the coarsest."""
        return (*active, 1)

    @staticmethod
    def exit_convs(in_chs: int, width: int, **kwargs) -> nn.Module:
        return nn.Sequential(
            ConvNormAct(in_chs, width, 3, stride=2, **kwargs),
            ConvNormAct(width, width, 1, **kwargs),
        )


default_cfgs = generate_default_cfgs(pretrained_cfgs(
    dict(msfuse_cifar=7, msfuse_cifar_budgeted=5),
    pool_size=(2, 2),
    first_conv='stages.0.layers.0.conv1.conv',
    paper_name='Multi-Exit Resource-Efficient Neural Architecture for Image Classification with Optimized Fusion '
               'Block',
    origin_url='https://hal.science/hal-04181149',
))


@register_model
def msfuse_cifar(pretrained: bool = False, **kwargs: Any) -> MSFuse:
    """The paper's network: 16 layers, 7 exits, 15 to 64 M MACs at 32x32."""
    return build_network(MSFuse, 'msfuse_cifar', pretrained, **kwargs)


@register_model
def msfuse_cifar_budgeted(pretrained: bool = False, **kwargs: Any) -> MSFuse:
    """The counterpart of MSDNet's budgeted network: 15 layers, 5 exits, 7 to 53 M MACs at 32x32."""
    return build_network(MSFuse, 'msfuse_cifar_budgeted', pretrained, **dict(dict(steps=(1, 2, 3, 4, 5)), **kwargs))
