"""DenseNet^MC: the CIFAR DenseNet with several classifiers, a baseline of the MSDNet paper.

Papers: `Multi-Scale Dense Networks for Resource Efficient Image Classification`, Huang et al., ICLR 2018 -
https://arxiv.org/abs/1703.09844 (the exits); `Densely Connected Convolutional Networks`, Huang et al., CVPR 2017 -
https://arxiv.org/abs/1608.06993 (the network)

Not specified by the papers, and chosen here:

* Growth and compression. The papers' figures end at about 131 M MACs. With the usual first width of 16, no integer
  growth comes within 2 % of that at the usual compressions, 1 (growth 6: 127.1 M) and 0.5 (growth 7: 122.6 M). Growth 8
  and compression 0.25 cost 132.9 M, and are also close to the figures at the middle exits (101.6 113.1 127.1 130.1 M;
  the figures show 103.0 115.9 127.1 129.2 M).
* The head: BN, activation, global average pooling and a linear classifier, like the network's own; each exit has its
  own BN. The two strided convolutions of MSDNet's exits would cost up to 42 M MACs at 32x32.
"""
from typing import Any, List, Sequence, Type, Union

import torch
from timm.layers import create_conv2d, get_norm_act_layer
from timm.models import generate_default_cfgs, register_model
from torch import nn

from ._base import MultiExitNet, StageBuilder, build_network
from ._blocks import chain_exits, init_weights
from ._pretrained import pretrained_cfgs

__all__ = ['DenseNetMC']


class Stem(nn.Module):
    """3x3 convolution, without BN: [(B, in_chans, H, W)] to [(B, width, H, W)]."""

    def __init__(self, in_chans: int, width: int, device=None, dtype=None):
        super().__init__()
        self.conv = create_conv2d(in_chans, width, 3, device=device, dtype=dtype)

    def forward(self, state: List[torch.Tensor]) -> List[torch.Tensor]:
        return [self.conv(state[-1])]


class NormActConv(nn.Sequential):
    """BN, activation, convolution: (B, in_chs, H, W) to (B, out_chs, H, W)."""

    def __init__(self, in_chs: int, out_chs: int, kernel_size: int, norm_act_layer, device=None, dtype=None):
        super().__init__()
        self.norm = norm_act_layer(in_chs, device=device, dtype=dtype)
        self.conv = create_conv2d(in_chs, out_chs, kernel_size, device=device, dtype=dtype)


class DenseLayer(nn.Module):
    """concat(x, conv3x3(x)): [(B, in_chs, H, W)] to [(B, in_chs + growth, H, W)]."""

    def __init__(self, in_chs: int, growth: int, **kwargs):
        super().__init__()
        self.conv = NormActConv(in_chs, growth, 3, **kwargs)

    def forward(self, state: List[torch.Tensor]) -> List[torch.Tensor]:
        x = state[-1]
        return [torch.cat([x, self.conv(x)], 1)]


class Transition(nn.Module):
    """1x1 convolution and 2x2 average pooling: [(B, in_chs, H, W)] to [(B, out_chs, H / 2, W / 2)]."""

    def __init__(self, in_chs: int, out_chs: int, **kwargs):
        super().__init__()
        self.conv = NormActConv(in_chs, out_chs, 1, **kwargs)
        self.pool = nn.AvgPool2d(2)

    def forward(self, state: List[torch.Tensor]) -> List[torch.Tensor]:
        return [self.pool(self.conv(state[-1]))]


class DenseNetMC(MultiExitNet):
    """DenseNet^MC of num_blocks * (depth + 1) + 1 layers.

    Args:
        num_blocks: Dense blocks; each has half the resolution of the previous one.
        depth: Layers of each dense block.
        exit_after: Layers of each block that an exit follows, numbered from 1; the last layer always has one.
        base_width: Channels of the first convolution.
        growth: Channels that a layer adds.
        compression: Fraction of the width that a transition keeps.
        num_classes, in_chans, global_pool, drop_rate, act_layer, norm_layer: As for any model of timm.

    Raises:
        ValueError: widths below 1, no layers, or an exit after a layer that a block does not have.
    """

    def __init__(
            self,
            num_classes: int = 10,
            in_chans: int = 3,
            global_pool: str = 'avg',
            num_blocks: int = 3,
            depth: int = 16,
            exit_after: Sequence[int] = (6, 12),
            base_width: int = 16,
            growth: int = 8,
            compression: float = 0.25,
            drop_rate: float = 0.,
            act_layer: Union[str, Type[nn.Module]] = nn.ReLU,
            norm_layer: Union[str, Type[nn.Module]] = nn.BatchNorm2d,
            device=None,
            dtype=None,
    ):
        dd = dict(device=device, dtype=dtype)
        norm_act_layer = get_norm_act_layer(norm_layer, act_layer)
        kwargs = dict(norm_act_layer=norm_act_layer, **dd)
        with_exit = chain_exits(num_blocks, depth, exit_after)
        if base_width < 1 or growth < 1:
            raise ValueError(f'base_width={base_width}, growth={growth}: both must be 1 or more')
        if not 0 < compression <= 1:
            raise ValueError(f'compression={compression}: a transition keeps a fraction of the width in (0, 1]')

        chs = base_width
        net = StageBuilder(num_classes, global_pool, drop_rate, **dd)
        net.add(Stem(in_chans, chs, **dd))
        for number in range(1, num_blocks * depth + 1):
            block, index = divmod(number - 1, depth)
            if block > 0 and index == 0:
                thin = max(1, int(chs * compression))
                net.add(Transition(chs, thin, **kwargs))
                chs = thin
            net.add(DenseLayer(chs, growth, **kwargs))
            chs += growth
            if number in with_exit:
                net.add_exit(chs, 2 ** block, norm_act_layer(chs, **dd))
        super().__init__(net.stages, net.exits, net.feature_info, num_classes, in_chans)
        self.apply(init_weights)


default_cfgs = generate_default_cfgs(pretrained_cfgs(
    dict(densenet52_mc_cifar=7),
    pool_size=(8, 8),
    first_conv='stages.0.layers.0.conv',
    paper_ids='arXiv:1703.09844',
    paper_name='Multi-Scale Dense Networks for Resource Efficient Image Classification',
))


@register_model
def densenet52_mc_cifar(pretrained: bool = False, **kwargs: Any) -> DenseNetMC:
    """52 layers, exits after layer 6 and 12 of each block and at the end: 7 exits, 16 to 133 M MACs at 32x32."""
    return build_network(DenseNetMC, 'densenet52_mc_cifar', pretrained, **kwargs)
