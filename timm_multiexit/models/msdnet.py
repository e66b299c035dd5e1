"""MSDNet: dense connections across layers, and from each scale to the next coarser one.

Paper: `Multi-Scale Dense Networks for Resource Efficient Image Classification`, Huang et al., ICLR 2018 -
https://arxiv.org/abs/1703.09844
"""
from typing import Any, List, Sequence, Tuple

import torch
from timm.models import generate_default_cfgs, register_model
from torch import nn

from ._base import build_network
from ._blocks import Bottleneck, ConvChain, strided_convs
from ._multiscale import MultiScaleNet
from ._pretrained import imagenet_cfgs, pretrained_cfgs
from ._public import checkpoint_filter_fn

__all__ = ['MSDNet']


class Stem(ConvChain):
    """The first maps of all scales (section 4, "First layer").

    Scale 1 is a 3x3 convolution of the image, each coarser scale a strided 3x3 convolution of the previous one. Maps
    [(B, in_chans, H, W)] to [(B, width * f_s, H / 2^(s-1), W / 2^(s-1)) for the last out_scales scales s].
    """

    def __init__(self, in_chans: int, width: int, scale_factors: Sequence[int], out_scales: int, **kwargs):
        scales = len(scale_factors)
        chs, strides = [width * f for f in scale_factors], [1] + [2] * (scales - 1)
        super().__init__(in_chans, chs, strides, first_out=scales - out_scales, **kwargs)


class ScaleGrowth(nn.Module):
    """One scale of a layer: concat(x_s, B(x_{s-1}, stride 2), B(x_s)), where both maps come from the *previous* layer.

    The finest scale of a layer that drops none has no finer one to read: concat(x_1, B(x_1)).

    Args:
        in_chs: Channels of the finer scale, if there is one, and of this one.
        growth_chs: Channels that the branches add together.
        factors: Bottleneck factors of these scales; a bottleneck uses the factor of the scale that it reads.
    """

    def __init__(self, in_chs: Sequence[int], growth_chs: int, factors: Sequence[int], **kwargs):
        super().__init__()
        half = growth_chs // 2 if len(in_chs) > 1 else 0
        self.down = Bottleneck(in_chs[0], half, factors[0], stride=2, **kwargs) if len(in_chs) > 1 else None
        self.own = Bottleneck(in_chs[-1], growth_chs - half, factors[-1], **kwargs)

    def forward(self, maps: List[torch.Tensor]) -> torch.Tensor:
        x = maps[-1]
        if self.down is None:
            return torch.cat([x, self.own(x)], 1)
        return torch.cat([x, self.down(maps[0]), self.own(x)], 1)


class ScaleLayer(nn.Module):
    """One layer of the lattice (section 4, "Subsequent layers").

    It computes the coarsest `out_scales` scales. A layer that drops a scale still reads it, so its finest scale has
    both branches like any other.

    Args:
        in_chs: Channels of each scale that is read, finest first.
        growth_chs: Channels that the layer adds to each of these scales.
        factors: Bottleneck factor of each of these scales.
        out_scales: Number of scales, coarsest last, that the layer computes.
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
        self.scales = nn.ModuleList()
        for s in range(self.first_out, len(in_chs)):
            read = slice(max(0, s - 1), s + 1)
            self.scales.append(ScaleGrowth(in_chs[read], growth_chs[s], factors[read], **kwargs))

    def forward(self, state: List[torch.Tensor]) -> List[torch.Tensor]:
        maps: List[torch.Tensor] = []
        for i, scale in enumerate(self.scales):
            s = self.first_out + i
            maps.append(scale(state[max(0, s - 1):s + 1]))
        return maps

    @torch.jit.ignore
    def keep_maps(self, kept: List[int]) -> List[int]:
        dropped = len(self.scales) + min(kept)
        self.scales = self.scales[dropped:]
        # The finest scale left may read one finer scale, which the layer no longer computes.
        self.first_out = min(1, self.first_out + dropped)
        return list(range(min(kept) - self.first_out, 0))


class MSDNet(MultiScaleNet):
    """MSDNet; for the arguments see `MultiScaleNet`."""

    stem_type = Stem
    layer_type = ScaleLayer
    finest_reduction = 1
    exit_convs = staticmethod(strided_convs)
    checkpoint_filter_fn = staticmethod(checkpoint_filter_fn)

    def __init__(self, *, base_width: int = 16, growth: int = 6, **kwargs: Any):
        super().__init__(base_width=base_width, growth=growth, **kwargs)

    @staticmethod
    def held_scales(active: Sequence[int]) -> Tuple[int, ...]:
        """Each layer reads the output of the previous one.

        The last exit reads the coarsest scale of layer L, which reads the two coarsest of layer L - 1, and so on. Finer
        scales may be active in the schedule but reach no exit, so they are not computed. In schedules that end with one
        scale, like the published ones, there are none.
        """
        held = (active[0], *active)
        return tuple(min(scales, len(active) - layer + 1) for layer, scales in enumerate(held))


_PAPER = dict(
    paper_ids='arXiv:1703.09844', paper_name='Multi-Scale Dense Networks for Resource Efficient Image Classification')
default_cfgs = generate_default_cfgs({
    **pretrained_cfgs(
        dict(msdnet_cifar=7, msdnet_cifar_budgeted=5), pool_size=(2, 2), first_conv='stages.0.layers.0.convs.0.conv',
        **_PAPER),
    **imagenet_cfgs(dict(msdnet_imagenet_s4=5, msdnet_imagenet_s6=5, msdnet_imagenet_s7=5), **_PAPER),
})


@register_model
def msdnet_cifar(pretrained: bool = False, **kwargs: Any) -> MSDNet:
    """The network for anytime prediction: 16 layers, 7 exits, 15 to 75 M MACs at 32x32."""
    return build_network(MSDNet, 'msdnet_cifar', pretrained, **kwargs)


@register_model
def msdnet_cifar_budgeted(pretrained: bool = False, **kwargs: Any) -> MSDNet:
    """The network for budgeted batch classification: 15 layers, 5 exits, 7 to 58 M MACs at 32x32."""
    return build_network(MSDNet, 'msdnet_cifar_budgeted', pretrained, **dict(dict(steps=(1, 2, 3, 4, 5)), **kwargs))


def _imagenet(variant: str, step: int, pretrained: bool, kwargs: Any) -> MSDNet:
    args = dict(
        steps=(step,) * 5, base_width=32, growth=16, scale_factors=(1, 2, 4, 4), head_width=None, large_stem=True)
    return build_network(MSDNet, variant, pretrained, **dict(args, **kwargs))


@register_model
def msdnet_imagenet_s4(pretrained: bool = False, **kwargs: Any) -> MSDNet:
    """The paper's ImageNet network of 20 layers: 5 exits, 337 to 1,356 M MACs at 224x224."""
    return _imagenet('msdnet_imagenet_s4', 4, pretrained, kwargs)


@register_model
def msdnet_imagenet_s6(pretrained: bool = False, **kwargs: Any) -> MSDNet:
    """The paper's ImageNet network of 30 layers: 5 exits, 511 to 2,735 M MACs at 224x224."""
    return _imagenet('msdnet_imagenet_s6', 6, pretrained, kwargs)


@register_model
def msdnet_imagenet_s7(pretrained: bool = False, **kwargs: Any) -> MSDNet:
    """The paper's ImageNet network of 35 layers: 5 exits, 612 to 3,246 M MACs at 224x224."""
    return _imagenet('msdnet_imagenet_s7', 7, pretrained, kwargs)
