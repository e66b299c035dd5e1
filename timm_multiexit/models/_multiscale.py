"""Base of MSDNet and MSFuse: a lattice of layers and scales, with the exits on the coarsest scale.

Paper: `Multi-Scale Dense Networks for Resource Efficient Image Classification`, Huang et al., ICLR 2018 -
https://arxiv.org/abs/1703.09844

Each layer adds channels to the map of every scale. Only the coarsest scale is classified, so the finer ones are dropped
one by one; where a scale is dropped, a transition reduces the channels of the others.
"""
from typing import List, Optional, Sequence, Tuple, Type, Union

import torch
from timm.layers import ConvNormAct
from torch import nn

from ._base import MultiExitNet, StageBuilder
from ._blocks import init_weights


class Transition(nn.Module):
    """1x1 convolution of each scale separately: [(B, in_chs[s], H_s, W_s)] to [(B, out_chs[s], H_s, W_s)]."""

    def __init__(self, in_chs: Sequence[int], out_chs: Sequence[int], **kwargs):
        super().__init__()
        self.convs = nn.ModuleList([ConvNormAct(i, o, 1, **kwargs) for i, o in zip(in_chs, out_chs)])

    def forward(self, state: List[torch.Tensor]) -> List[torch.Tensor]:
        maps: List[torch.Tensor] = []
        for i, conv in enumerate(self.convs):
            maps.append(conv(state[i]))
        return maps

    @torch.jit.ignore
    def keep_maps(self, kept: List[int]) -> List[int]:
        self.convs = self.convs[min(kept):]
        return list(range(min(kept), 0))


def scale_schedule(num_layers: int, num_scales: int) -> Tuple[int, ...]:
    """Active scales in layer 1 to num_layers: S - floor((l - 1) / ceil(L / S)) (MSDNet paper, section 4)."""
    block = -(-num_layers // num_scales)
    return tuple(num_scales - layer // block for layer in range(num_layers))


class MultiScaleNet(MultiExitNet):
    """A lattice of layers and scales.

    Layers 1 to L = sum(steps) are split into as many blocks as there are scales; each block drops the finest scale of
    the previous one, and a transition after its first layer reduces the channels of the other scales.

    An architecture sets its stem, its layer and its exits' convolutions, and which maps a layer outputs.

    Args:
        steps: Layers in each stage; an exit follows each.
        base_width: Width n of the first maps, in units of the scale factors.
        growth: Growth g per layer, in units of the scale factors.
        scale_factors: Width factor f of each scale, finest first.
        bottleneck_factors: Bottleneck factor b of each scale; None for the scale factors.
        reduction: Fraction of the width that a transition keeps.
        head_width: Channels of an exit's convolutions; None for those of the map that it reads.
        large_stem: 7x7 convolution of stride 2 and max pooling before scale 1, as for ImageNet.
        num_classes, in_chans, global_pool, drop_rate, act_layer, norm_layer: As for any model of timm.

    Raises:
        ValueError: a schedule or widths that no network can be built from.
    """

    # Set by the architecture. `stem_type(in_chans, width, scale_factors, out_scales)` outputs the first maps of the
    # coarsest `out_scales` scales; `layer_type(in_chs, growth_chs, factors, out_scales)` reads the coarsest
    # `len(in_chs)` scales and outputs the coarsest `out_scales`.
    stem_type: Type[nn.Module]
    layer_type: Type[nn.Module]
    finest_reduction: int  # image size / size of scale 1

    @staticmethod
    def held_scales(active: Sequence[int]) -> Tuple[int, ...]:
        """Number of scales that the stem and each layer output, coarsest last: L + 1 numbers."""
        raise NotImplementedError

    @staticmethod
    def exit_convs(in_chs: int, width: int, **kwargs) -> nn.Module:
        """An exit's convolutions, from (B, in_chs, H, W) to (B, width, H', W')."""
        raise NotImplementedError

    def __init__(
            self,
            base_width: int,
            growth: int,
            num_classes: int = 10,
            in_chans: int = 3,
            global_pool: str = 'avg',
            steps: Sequence[int] = (4, 2, 2, 2, 2, 2, 2),
            scale_factors: Sequence[int] = (1, 2, 4),
            bottleneck_factors: Optional[Sequence[int]] = None,
            reduction: float = 0.5,
            head_width: Optional[int] = 128,
            large_stem: bool = False,
            drop_rate: float = 0.,
            act_layer: Union[str, Type[nn.Module]] = nn.ReLU,
            norm_layer: Union[str, Type[nn.Module]] = nn.BatchNorm2d,
            device=None,
            dtype=None,
    ):
        kwargs = dict(act_layer=act_layer, norm_layer=norm_layer, device=device, dtype=dtype)
        factors = scale_factors if bottleneck_factors is None else bottleneck_factors
        if not steps or min(steps) < 1:
            raise ValueError(f'steps={tuple(steps)}: every stage needs at least one layer')
        if not scale_factors or min(scale_factors) < 1:
            raise ValueError(f'scale_factors={tuple(scale_factors)}: give a factor of 1 or more for every scale')
        if len(factors) != len(scale_factors) or min(factors) < 1:
            raise ValueError(
                f'bottleneck_factors={tuple(factors)} for {len(scale_factors)} scales: give a factor of 1 or '
                'more for every scale')
        if base_width < 1 or growth < 1:
            raise ValueError(f'base_width={base_width}, growth={growth}: both must be 1 or more')
        if growth * min(scale_factors[1:], default=2) < 2:
            raise ValueError(
                f'growth={growth} with scale_factors={tuple(scale_factors)}: two branches share the growth of '
                'a coarser scale, so growth times its factor must be 2 or more')
        if not 0 < reduction <= 1:
            raise ValueError(f'reduction={reduction}: a transition keeps a fraction of the width in (0, 1]')

        num_scales = len(scale_factors)
        active = scale_schedule(sum(steps), num_scales)
        held = self.held_scales(active)
        net = StageBuilder(num_classes, global_pool, drop_rate, device, dtype)
        stem = dict(kwargs, large_stem=True) if large_stem else kwargs
        net.add(self.stem_type(in_chans, base_width, scale_factors, held[0], **stem))
        n, layer = base_width, 0
        for step in steps:
            for _ in range(step):
                f, b = scale_factors[-held[layer]:], factors[-held[layer]:]
                out_scales = held[layer + 1]
                net.add(self.layer_type([n * s for s in f], [growth * s for s in f], b, out_scales, **kwargs))
                n += growth
                if layer > 0 and active[layer] < active[layer - 1]:
                    f, thin = f[-out_scales:], max(1, int(n * reduction))
                    net.add(Transition([n * s for s in f], [thin * s for s in f], **kwargs))
                    n = thin
                layer += 1
            chs = n * scale_factors[-1]
            size_reduction = self.finest_reduction * 2 ** (num_scales - 1) * (4 if large_stem else 1)
            width = head_width or chs
            net.add_exit(chs, size_reduction, self.exit_convs(chs, width, **kwargs), width)
        super().__init__(net.stages, net.exits, net.feature_info, num_classes, in_chans)
        self.apply(init_weights)
