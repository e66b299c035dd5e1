"""ResNet^MC: the CIFAR ResNet with several classifiers, a baseline of the MSDNet paper.

Papers: `Multi-Scale Dense Networks for Resource Efficient Image Classification`, Huang et al., ICLR 2018 -
https://arxiv.org/abs/1703.09844 (the exits); `Deep Residual Learning for Image Recognition`, He et al., CVPR 2016 -
https://arxiv.org/abs/1512.03385 (the network, section 4.2)

Not specified by the papers, and chosen here:

* The head: global average pooling and a linear classifier, like the network's own. The two strided convolutions of
  MSDNet's exits would cost 14 M MACs at 32x32, three quarters of the four blocks between two exits.
* The first block of a resolution. If its strided convolution also doubles the width, as in He et al., the network costs
  139.6 M MACs; the papers' figures end at about 135 M. If it keeps the width and the second convolution doubles it, the
  cost is 136.1 M: the default. `narrow_stride=False` gives the former.
* The shortcut where the shape changes: subsampled and padded with zeros, He et al.'s option A for CIFAR.
"""
from typing import Any, List, Sequence, Type, Union

import torch
import torch.nn.functional as F
from timm.layers import ConvNormAct, create_act_layer
from timm.models import generate_default_cfgs, register_model
from torch import nn

from ._base import MultiExitNet, StageBuilder, build_network
from ._blocks import ConvStem, chain_exits, init_weights
from ._pretrained import pretrained_cfgs

__all__ = ['ResNetMC']


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: [(B, in_chs, H, W)] to [(B, out_chs, H / stride, W / stride)]."""

    def __init__(self, in_chs: int, mid_chs: int, out_chs: int, stride: int, act_layer, **kwargs):
        super().__init__()
        self.stride = stride
        self.pad_chs = out_chs - in_chs
        self.conv1 = ConvNormAct(in_chs, mid_chs, 3, stride=stride, act_layer=act_layer, **kwargs)
        self.conv2 = ConvNormAct(mid_chs, out_chs, 3, apply_act=False, act_layer=act_layer, **kwargs)
        self.act = create_act_layer(act_layer)

    def forward(self, state: List[torch.Tensor]) -> List[torch.Tensor]:
        x = state[-1]
        shortcut = x
        if self.stride > 1:
            shortcut = shortcut[:, :, ::self.stride, ::self.stride]
        if self.pad_chs > 0:
            shortcut = F.pad(shortcut, [0, 0, 0, 0, 0, self.pad_chs])
        return [self.act(shortcut + self.conv2(self.conv1(x)))]


class ResNetMC(MultiExitNet):
    """ResNet^MC of 2 * len(widths) * depth + 2 layers.

    Args:
        widths: Channels at each resolution; each has half the size of the previous one.
        depth: Basic blocks at each resolution.
        exit_after: Blocks of each resolution that an exit follows, numbered from 1; the last block always has one.
        narrow_stride: Whether the strided convolution at the start of a resolution keeps the previous width.
        num_classes, in_chans, global_pool, drop_rate, act_layer, norm_layer: As for any model of timm.

    Raises:
        ValueError: decreasing widths, no blocks, or an exit after a block that a resolution does not have.
    """

    def __init__(
            self,
            num_classes: int = 10,
            in_chans: int = 3,
            global_pool: str = 'avg',
            widths: Sequence[int] = (16, 32, 64),
            depth: int = 10,
            exit_after: Sequence[int] = (4, 8),
            narrow_stride: bool = True,
            drop_rate: float = 0.,
            act_layer: Union[str, Type[nn.Module]] = nn.ReLU,
            norm_layer: Union[str, Type[nn.Module]] = nn.BatchNorm2d,
            device=None,
            dtype=None,
    ):
        kwargs = dict(act_layer=act_layer, norm_layer=norm_layer, device=device, dtype=dtype)
        with_exit = chain_exits(len(widths), depth, exit_after)
        if min(widths) < 1 or list(widths) != sorted(widths):
            raise ValueError(f'widths={tuple(widths)}: give widths of 1 or more that do not decrease')

        chs = widths[0]
        net = StageBuilder(num_classes, global_pool, drop_rate, device, dtype)
        net.add(ConvStem(in_chans, chs, **kwargs))
        for number in range(1, len(widths) * depth + 1):
            resolution, index = divmod(number - 1, depth)
            width = widths[resolution]
            stride = 2 if resolution > 0 and index == 0 else 1
            mid_chs = chs if narrow_stride and stride > 1 else width
            net.add(BasicBlock(chs, mid_chs, width, stride, **kwargs))
            chs = width
            if number in with_exit:
                net.add_exit(chs, 2 ** resolution)
        super().__init__(net.stages, net.exits, net.feature_info, num_classes, in_chans)
        self.apply(init_weights)


default_cfgs = generate_default_cfgs(pretrained_cfgs(
    dict(resnet62_mc_cifar=7),
    pool_size=(8, 8),
    first_conv='stages.0.layers.0.conv.conv',
    paper_ids='arXiv:1703.09844',
    paper_name='Multi-Scale Dense Networks for Resource Efficient Image Classification',
))


@register_model
def resnet62_mc_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetMC:
    """62 layers, exits after block 4 and 8 of each resolution and at the end: 7 exits, 19 to 136 M MACs at 32x32."""
    return build_network(ResNetMC, 'resnet62_mc_cifar', pretrained, **kwargs)
