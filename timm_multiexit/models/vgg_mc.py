"""VGG^MC: a few wide convolutions with several classifiers, fast to train rather than cheap in MACs.

Papers: `Very Deep Convolutional Networks for Large-Scale Image Recognition`, Simonyan and Zisserman, ICLR 2015 -
https://arxiv.org/abs/1409.1556 (the chain of 3x3 convolutions and pooling); `Multi-Scale Dense Networks for Resource
Efficient Image Classification`, Huang et al., ICLR 2018 - https://arxiv.org/abs/1703.09844 (the exits)

No paper describes this network. It costs more MACs than the multi-scale ones, but in a few large matrix products, which
run several times faster than the same MACs in narrow layers. So it trains quickly, and as its errors are less
correlated with theirs, an ensemble of both kinds is a better distillation teacher than either alone.
"""
from typing import Any, List, Sequence, Type, Union

import torch
from timm.layers import ConvNormAct, create_conv2d, get_norm_act_layer
from timm.models import generate_default_cfgs, register_model
from torch import nn

from ._base import MultiExitNet, StageBuilder, build_network
from ._blocks import ConvStem, init_weights
from ._pretrained import pretrained_cfgs

__all__ = ['VGGMC']


class PooledConv(nn.Module):
    """3x3 convolution, max pooling, then BN and activation: [(B, in_chs, H, W)] to [(B, out_chs, H / 2, W / 2)]."""

    def __init__(self, in_chs: int, out_chs: int, act_layer, norm_layer, device=None, dtype=None):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.conv = create_conv2d(in_chs, out_chs, 3, bias=False, **dd)
        self.pool = nn.MaxPool2d(2, ceil_mode=True)
        self.bn = get_norm_act_layer(norm_layer, act_layer)(out_chs, **dd)

    def forward(self, state: List[torch.Tensor]) -> List[torch.Tensor]:
        return [self.bn(self.pool(self.conv(state[-1])))]


class ResidualConv(nn.Module):
    """3x3 convolution with a shortcut: [(B, chs, H, W)] to [(B, chs, H, W)]."""

    def __init__(self, chs: int, **kwargs):
        super().__init__()
        self.conv = ConvNormAct(chs, chs, 3, **kwargs)

    def forward(self, state: List[torch.Tensor]) -> List[torch.Tensor]:
        return [state[-1] + self.conv(state[-1])]


class VGGMC(MultiExitNet):
    """VGG^MC of depth * len(widths) + 2 layers, with an exit at each resolution.

    Args:
        stem_width: Channels at the image's resolution.
        widths: Channels at each further resolution; each has half the size of the previous one.
        depth: Convolutions at each of these.
        num_classes, in_chans, global_pool, drop_rate, act_layer, norm_layer: As for any model of timm.

    Raises:
        ValueError: no resolution, or one without channels or convolutions.
    """

    def __init__(
            self,
            num_classes: int = 10,
            in_chans: int = 3,
            global_pool: str = 'avg',
            stem_width: int = 32,
            widths: Sequence[int] = (64, 256, 256),
            depth: int = 2,
            drop_rate: float = 0.,
            act_layer: Union[str, Type[nn.Module]] = nn.ReLU,
            norm_layer: Union[str, Type[nn.Module]] = nn.BatchNorm2d,
            device=None,
            dtype=None,
    ):
        if not widths or min(widths) < 1:
            raise ValueError(f'widths={tuple(widths)}: give at least one resolution, and a width of 1 or more for each')
        if depth < 1:
            raise ValueError(f'depth={depth}: give 1 convolution or more for each resolution')
        kwargs = dict(act_layer=act_layer, norm_layer=norm_layer, device=device, dtype=dtype)
        chs = stem_width
        net = StageBuilder(num_classes, global_pool, drop_rate, device, dtype)
        net.add(ConvStem(in_chans, chs, **kwargs))
        for resolution, width in enumerate(widths, 1):
            net.add(PooledConv(chs, width, **kwargs))
            for _ in range(depth - 1):
                net.add(ResidualConv(width, **kwargs))
            chs = width
            net.add_exit(chs, 2 ** resolution)
        super().__init__(net.stages, net.exits, net.feature_info, num_classes, in_chans)
        self.apply(init_weights)


default_cfgs = generate_default_cfgs(pretrained_cfgs(
    dict(vgg8_mc_cifar=3),
    pool_size=(4, 4),
    first_conv='stages.0.layers.0.conv.conv',
))


@register_model
def vgg8_mc_cifar(pretrained: bool = False, **kwargs: Any) -> VGGMC:
    """8 layers, exits at 16x16, 8x8 and 4x4 of a 32x32 image."""
    return build_network(VGGMC, 'vgg8_mc_cifar', pretrained, **kwargs)
