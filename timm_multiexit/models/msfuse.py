"""MSFuse: MSDNet with a fusion layer across scales and an efficient stem.

Paper: `Multi-Exit Resource-Efficient Neural Architecture for Image Classification with Optimized Fusion Block`,
Addad, Lechervy, Jurie, ICCV Workshops 2023 - https://hal.science/hal-04181149

The paper prints no table of widths. The defaults are MSDNet's anytime schedule at twice its widths with the finest
scale at half the image's size, which gives the paper's ratios of cost (15 % below MSDNet, 32 % below RANet). The text
leaves the activation open; the default is ReLU.
"""
from typing import Any, Dict, List, Optional, Sequence, Tuple, Type, Union

import torch
from torch import nn
from timm.layers import ConvNormAct
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from ._cfgs import cifar_cfg
from .base import ExitHead, MultiExitNet, Stage
from .layers import Bottleneck, init_weights

__all__ = ['MSFuse']


class Stem(nn.Module):
    """The first maps of all scales (section 2, "An efficient stem layer").

    Convolution 3x3, depthwise 3x3, 1x1, the first one's output added (no activation after the addition), depthwise
    3x3 with stride 2: scale 1, at half the image's size. Each coarser scale is a strided 3x3 convolution of the one
    before. Maps [(B, in_chans, H, W)] to [(B, width * f_s, H / 2^(s+1), W / 2^(s+1)) for each scale s].
    """

    def __init__(self, in_chans: int, width: int, scale_factors: Sequence[int], **kwargs):
        super().__init__()
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
        return maps


class FusionLayer(nn.Module):
    """The paper's layer (section 2, "An improved fusion layer"): each scale reads what this layer gave the finer one.

    The finest scale: concat(x, B(x)). Every other: concat(x_s, B(y_{s-1}, stride 2), B(x_s)), where y_{s-1} is the
    *output* of scale s-1 in this same layer; MSDNet has the previous layer's x_{s-1} there.

    Args:
        in_chs: Channels of each active scale, finest first.
        growth_chs: Channels that the layer adds to each active scale.
        factors: Bottleneck factor of each active scale; a bottleneck takes the factor of the scale that it reads.
        out_scales: How many scales, coarsest last, a later layer still reads; the others are not handed on.
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


class Transition(nn.Module):
    """1x1 convolution on each scale by itself (section 2): (B, in_chs, H, W) to (B, out_chs, H, W)."""

    def __init__(self, in_chs: Sequence[int], out_chs: Sequence[int], **kwargs):
        super().__init__()
        self.convs = nn.ModuleList([ConvNormAct(i, o, 1, **kwargs) for i, o in zip(in_chs, out_chs)])

    def forward(self, state: List[torch.Tensor]) -> List[torch.Tensor]:
        maps: List[torch.Tensor] = []
        for i, conv in enumerate(self.convs):
            maps.append(conv(state[i]))
        return maps


class MSFuse(MultiExitNet):
    """MSFuse.

    The layers 1 to L = sum(steps) are split into as many blocks as there are scales; each block drops the finest
    scale of the one before, and its first layer is followed by a transition that halves the widths.

    Args:
        num_classes: Classes, 0 for no classifier.
        in_chans: Channels of the image.
        global_pool: timm's pooling type, '' for none.
        steps: Layers in each stage; an exit follows each.
        base_width: Width n of the first maps, in units of the scale factors.
        growth: Growth g per layer, in units of the scale factors.
        scale_factors: Width factor f of each scale, finest first; their number is the number of scales.
        bottleneck_factors: Bottleneck factor b of each scale; None for the scale factors.
        reduction: Share of the width that a transition keeps.
        head_width: Channels of an exit's convolutions.
        drop_rate: Dropout before the classifiers.
        act_layer: Activation.
        norm_layer: Normalisation.

    Raises:
        ValueError: a schedule that no network can be built from.
    """

    def __init__(
            self,
            num_classes: int = 10,
            in_chans: int = 3,
            global_pool: str = 'avg',
            steps: Sequence[int] = (4, 2, 2, 2, 2, 2, 2),
            base_width: int = 32,
            growth: int = 12,
            scale_factors: Sequence[int] = (1, 2, 4),
            bottleneck_factors: Optional[Sequence[int]] = None,
            reduction: float = 0.5,
            head_width: int = 128,
            drop_rate: float = 0.,
            act_layer: Union[str, Type[nn.Module]] = nn.ReLU,
            norm_layer: Union[str, Type[nn.Module]] = nn.BatchNorm2d,
            device=None,
            dtype=None,
    ):
        kwargs = dict(act_layer=act_layer, norm_layer=norm_layer, device=device, dtype=dtype)
        factors = tuple(bottleneck_factors or scale_factors)
        num_scales, num_layers = len(scale_factors), sum(steps)
        if len(factors) != num_scales:
            raise ValueError(f'{len(factors)} bottleneck factors {factors} for {num_scales} scales: give one per scale')
        if not steps or min(steps) < 1:
            raise ValueError(f'steps={tuple(steps)}: every stage needs at least one layer')

        active = scale_schedule(num_layers, num_scales)
        layers: List[nn.Module] = [Stem(in_chans, base_width, scale_factors, **kwargs)]
        stages, exits, feature_info = [], [], []
        n, layer = base_width, 0
        for k, step in enumerate(steps):
            for _ in range(step):
                now = active[layer]
                after = active[layer + 1] if layer + 1 < num_layers else 1
                f, b = scale_factors[-now:], factors[-now:]
                fusion = FusionLayer([n * s for s in f], [growth * s for s in f], b, out_scales=after, **kwargs)
                layers.append(fusion)
                n += growth
                if layer > 0 and now < active[layer - 1]:
                    # A layer can start a block and end it too (one layer a block); then it has fewer maps to pass on.
                    f = f[-after:]
                    thin = int(n * reduction)
                    layers.append(Transition([n * s for s in f], [thin * s for s in f], **kwargs))
                    n = thin
                layer += 1
            chs = n * scale_factors[-1]
            stages.append(Stage(layers))
            layers = []
            convs = nn.Sequential(
                ConvNormAct(chs, head_width, 3, stride=2, **kwargs),
                ConvNormAct(head_width, head_width, 1, **kwargs),
            )
            exits.append(ExitHead(
                convs, chs, head_width, num_classes, global_pool, drop_rate, device=device, dtype=dtype))
            feature_info.append(dict(num_chs=chs, reduction=2 ** num_scales, module=f'stages.{k}'))
        super().__init__(stages, exits, feature_info, num_classes, in_chans)
        self.apply(init_weights)


def scale_schedule(num_layers: int, num_scales: int) -> Tuple[int, ...]:
    """Active scales in layer 1 to num_layers: S - floor((l - 1) / ceil(L / S)) (MSDNet paper, section 4)."""
    block = -(-num_layers // num_scales)
    return tuple(num_scales - layer // block for layer in range(num_layers))


def _cfg(**kwargs: Any) -> Dict[str, Any]:
    return cifar_cfg(
        pool_size=(2, 2),
        first_conv='stages.0.layers.0.conv1.conv',
        paper_name='Multi-Exit Resource-Efficient Neural Architecture for Image Classification with Optimized Fusion '
                   'Block',
        origin_url='https://hal.science/hal-04181149',
        **kwargs)


default_cfgs = generate_default_cfgs({
    'msfuse_cifar.cifar10': _cfg(name='msfuse_cifar.cifar10', num_exits=7),
    'msfuse_cifar.cifar100': _cfg(name='msfuse_cifar.cifar100', num_exits=7),
    'msfuse_cifar_budgeted.cifar10': _cfg(name='msfuse_cifar_budgeted.cifar10', num_exits=5),
    'msfuse_cifar_budgeted.cifar100': _cfg(name='msfuse_cifar_budgeted.cifar100', num_exits=5),
})


def _create_msfuse(variant: str, pretrained: bool = False, **kwargs: Any) -> MSFuse:
    out_indices = tuple(range(len(kwargs['steps'])))
    return build_model_with_cfg(
        MSFuse, variant, pretrained, feature_cfg=dict(out_indices=out_indices, feature_cls='getter'), **kwargs)


@register_model
def msfuse_cifar(pretrained: bool = False, **kwargs: Any) -> MSFuse:
    """The paper's network: 16 layers, 7 exits, 15 to 64 M MACs at 32x32."""
    return _create_msfuse('msfuse_cifar', pretrained, **dict(dict(steps=(4, 2, 2, 2, 2, 2, 2)), **kwargs))


@register_model
def msfuse_cifar_budgeted(pretrained: bool = False, **kwargs: Any) -> MSFuse:
    """The counterpart of MSDNet's budgeted network: 15 layers, 5 exits, 7 to 53 M MACs at 32x32."""
    return _create_msfuse('msfuse_cifar_budgeted', pretrained, **dict(dict(steps=(1, 2, 3, 4, 5)), **kwargs))
