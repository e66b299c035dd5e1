"""RANet: sub-networks for coarse to fine images, each of which reads the maps of the previous one.

Paper: `Resolution Adaptive Networks for Efficient Inference`, Yang et al., CVPR 2020 -
https://arxiv.org/abs/2003.07326

Sub-network 0 works at the lowest resolution and has the first exits; the next ones start from finer maps and run only
for images that have not left. All end at the resolution of the first one, where the exits are.
"""
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple, Type, Union

import torch
import torch.nn.functional as F
from timm.layers import ConvNormAct
from timm.models import generate_default_cfgs, register_model
from torch import nn

from ._base import MultiExitNet, StageBuilder, build_network
from ._blocks import Bottleneck, ConvChain, init_weights, strided_convs
from ._pretrained import imagenet_cfgs, pretrained_cfgs
from ._public import checkpoint_filter_fn

__all__ = ['RANet']


def resize_like(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`x` resized bilinearly to the height and width of `like`, corners aligned."""
    return F.interpolate(x, size=like.shape[-2:], mode='bilinear', align_corners=True)


class Stem(ConvChain):
    """The inputs of all sub-networks: one chain of 3x3 convolutions, from the last one's input to the first one's.

    Maps [(B, in_chans, H, W)] to [(B, chs[i], H_i, W_i)], last sub-network first, in the order of the chain.

    Args:
        in_chans: Channels of the image.
        chs: Channels of each sub-network's input, first sub-network first.
        scales: Scale of each sub-network; where it falls, the convolution has a stride.
    """

    def __init__(self, in_chans: int, chs: Sequence[int], scales: Sequence[int], **kwargs):
        falls = [finer - scale for scale, finer in zip(scales, [*scales[1:], scales[-1]])]
        super().__init__(in_chans, chs[::-1], [2 ** fall for fall in reversed(falls)], **kwargs)


class FusionLayer(nn.Module):
    """concat(x, B(low), B(x)), all resized to B(x): the size of x divided by the stride.

    Args:
        in_chs: Channels of x.
        low_chs: Channels of the lower sub-network's map.
        growth: Channels of the two branches together.
        compress: Fraction of the growth, rounded down, that comes from the lower sub-network's branch.
        factor: Bottleneck factor of this sub-network.
        low_factor: Bottleneck factor of the lower sub-network.
        stride: Stride of B(x).
    """

    def __init__(
            self,
            in_chs: int,
            low_chs: int,
            growth: int,
            compress: float,
            factor: int,
            low_factor: int,
            stride: int,
            **kwargs,
    ):
        super().__init__()
        low_growth = int(growth * compress)
        self.stride = stride
        self.low = Bottleneck(low_chs, low_growth, low_factor, **kwargs)
        self.own = Bottleneck(in_chs, growth - low_growth, factor, stride=stride, **kwargs)

    def forward(self, x: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        own = self.own(x)
        if self.stride > 1:
            x = resize_like(x, own)
        return torch.cat([x, resize_like(self.low(low), own), own], 1)


class BlockPlan(NamedTuple):
    """One block, and the places of its maps in the state; see `plan_blocks`."""
    net: int  # sub-network
    index: int  # block of the sub-network
    in_chs: int
    layers_chs: int  # after the last layer
    end_chs: int  # with the channels that a fusion block's end adds
    out_chs: int  # after the transition, if there is one
    num_layers: int
    growth: int
    low: Optional['BlockPlan']  # the block of the lower sub-network that it reads; None for a plain block
    down: bool
    transition: bool
    num_maps: int = 0  # maps of the state before the block
    read: Tuple[int, ...] = ()  # maps of the state that the block reads
    keep: Tuple[int, ...] = ()  # maps of the state, then of the block, that form the next state


class Block(nn.Module):
    """A block of dense layers: reads some maps of the state, adds its own and drops those that no later block reads."""

    def __init__(self, plan: BlockPlan):
        super().__init__()
        self.num_maps = plan.num_maps
        self.read: List[int] = list(plan.read)
        self.keep: List[int] = list(plan.keep)

    def forward_block(self, maps: List[torch.Tensor]) -> List[torch.Tensor]:
        raise NotImplementedError

    def forward(self, state: List[torch.Tensor]) -> List[torch.Tensor]:
        maps = state + self.forward_block([state[i] for i in self.read])
        return [maps[i] for i in self.keep]

    @torch.jit.ignore
    def keep_maps(self, kept: List[int]) -> List[int]:
        keep = [self.keep[i] for i in kept]
        needed = sorted({*self.read, *(i for i in keep if i < self.num_maps)})
        place = {i: place for place, i in enumerate(needed)}
        # The block's own maps come after those of the state.
        self.keep = [place[i] if i in place else i - self.num_maps + len(needed) for i in keep]
        self.read = [place[i] for i in self.read]
        from_end = [i - self.num_maps for i in needed]
        self.num_maps = len(needed)
        return from_end


class PlainBlock(Block):
    """Dense layers concat(x, B(x)). An exit follows each plain block."""

    def __init__(self, plan: BlockPlan, factors: Sequence[int], **kwargs):
        super().__init__(plan)
        self.layers = nn.ModuleList([
            Bottleneck(plan.in_chs + i * plan.growth, plan.growth, factors[plan.net], **kwargs)
            for i in range(plan.num_layers)
        ])

    def forward_block(self, maps: List[torch.Tensor]) -> List[torch.Tensor]:
        x = maps[0]
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return [x]  # read by the next block, the upper sub-network and the exit


class FusionBlock(Block):
    """Fusion layers that read the block of the same index in the lower sub-network, and an end.

    Layer i reads the input of the lower block's layer i. The layers are dense, so that input is the first channels of
    the lower block's map: one map holds the inputs of all layers, or two after a down block, the last before the
    halving and the one after it.

    At the end, a 1x1 convolution of the lower block's last map is concatenated; a transition may follow. In a down
    block the last layer has stride 2.
    """

    def __init__(self, plan: BlockPlan, compress: float, factors: Sequence[int], **kwargs):
        super().__init__(plan)
        low, self.down = plan.low, plan.down
        self.low_chs: List[int] = [low.in_chs + i * low.growth for i in range(plan.num_layers)]
        self.layers = nn.ModuleList()
        for i in range(plan.num_layers):
            stride = 2 if plan.down and i == plan.num_layers - 1 else 1
            self.layers.append(FusionLayer(
                plan.in_chs + i * plan.growth, self.low_chs[i], plan.growth, compress, factors[plan.net],
                factors[low.net], stride, **kwargs))
        self.end = ConvNormAct(low.layers_chs, plan.end_chs - plan.layers_chs, 1, **kwargs)
        self.transition = ConvNormAct(plan.end_chs, plan.out_chs, 1, **kwargs) if plan.transition else None

    def forward_block(self, maps: List[torch.Tensor]) -> List[torch.Tensor]:
        x, low = maps[0], maps[1]
        before = x
        for i, layer in enumerate(self.layers):
            before = x
            x = layer(x, low[:, :self.low_chs[i]])
        return self.end_block(before, x, torch.cat([x, resize_like(self.end(maps[-1]), x)], 1))

    def end_block(self, before: torch.Tensor, x: torch.Tensor, out: torch.Tensor) -> List[torch.Tensor]:
        """The block's maps, from those before and after its last layer and the latter with its end's."""
        # The next block reads `out`, the upper sub-network the other maps.
        if self.transition is not None:
            out = self.transition(out)
        if self.down:
            return [before, x, out]
        return [x, out]


def plan_blocks(
        scales: Sequence[int],
        block_layers: Sequence[int],
        exits_per_net: int,
        base_width: int,
        growth: int,
        width_factors: Sequence[int],
        compress: float,
        reduction: float,
) -> List[BlockPlan]:
    """The blocks of all sub-networks, in the order in which they run.

    Sub-network i of `scales` s_i has (i + 1) * exits_per_net blocks. All but the last exits_per_net are fusion blocks.
    The s_i - 1 down blocks are every exits_per_net-th fusion block, counted from the last. The s_i - 1 transitions
    split the blocks into s_i equal parts, rounded down.
    """
    plans: List[BlockPlan] = []
    for net, scale in enumerate(scales):
        num_blocks = (net + 1) * exits_per_net
        num_fusion = net * exits_per_net
        downs = [num_fusion - j * exits_per_net - 1 for j in range(scale - 1)]
        transitions = [j * num_blocks // scale - 1 for j in range(1, scale)]
        lower = [plan for plan in plans if plan.net == net - 1]
        chs, g = base_width * width_factors[net], growth * width_factors[net]
        for index in range(num_blocks):
            low = lower[index] if index < num_fusion else None
            layers_chs = chs + block_layers[index] * g
            end_chs = layers_chs if low is None else layers_chs + int(layers_chs * compress)
            out_chs = max(1, int(end_chs * reduction)) if index in transitions else end_chs
            plans.append(BlockPlan(
                net, index, chs, layers_chs, end_chs, out_chs, block_layers[index], g, low, index in downs,
                index in transitions))
            chs = out_chs
    return _plan_state(plans, len(scales))


def _plan_state(plans: Sequence[BlockPlan], num_nets: int) -> List[BlockPlan]:
    """Fills in the last three fields: a map is kept as long as a later block, or the exit of this one, reads it."""
    def maps_of(plan: BlockPlan) -> List[Tuple]:
        """Keys of the maps that the upper sub-network reads."""
        return [(plan.net, plan.index, name) for name in (('before', 'last') if plan.down else ('last',))]

    def out_of(plan: BlockPlan) -> Tuple:
        return (plan.net, plan.index, 'last' if plan.low is None else 'out')

    reads, writes = [], []
    for i, plan in enumerate(plans):
        x = (plan.net, 'input') if plan.index == 0 else out_of(plans[i - 1])
        reads.append([x] + (maps_of(plan.low) if plan.low is not None else []))
        writes.append(maps_of(plan) + ([] if plan.low is None else [out_of(plan)]))

    state: List[Tuple] = [(net, 'input') for net in reversed(range(num_nets))]
    planned = []
    for i, plan in enumerate(plans):
        needed = {name for later in reads[i + 1:] for name in later}
        if plan.low is None:
            needed.add(out_of(plan))
        names = state + writes[i]
        keep = tuple(j for j, name in enumerate(names) if name in needed)
        read = tuple(state.index(name) for name in reads[i])
        planned.append(plan._replace(num_maps=len(state), read=read, keep=keep))
        state = [names[j] for j in keep]
    return planned


class RANet(MultiExitNet):
    """RANet.

    Args:
        scales: Scale of each sub-network's input, 1 for the coarsest. Starts with 1 and grows by at most 1.
        block_layers: Layers in block 1, 2, ... of any sub-network; as many as the last sub-network has blocks.
        exits_per_net: Exits of each sub-network; each has that many blocks more than the previous one.
        base_width: Channels of a sub-network's input, times its width factor.
        growth: Growth per layer, times the width factor.
        width_factors: Width factor of each sub-network.
        bottleneck_factors: Bottleneck factor of each sub-network; None for the width factors.
        compress: Fraction of a fusion block's growth and end that comes from the lower sub-network.
        reduction: Fraction of the width that a transition keeps.
        head_width: Channels of an exit's convolutions; None for those of the map that it reads.
        large_stem: 7x7 convolution of stride 2 and max pooling before the finest input, as for ImageNet.
        num_classes, in_chans, global_pool, drop_rate, act_layer, norm_layer: As for any model of timm.

    Raises:
        ValueError: scales, blocks or widths that no network can be built from.
    """

    checkpoint_filter_fn = staticmethod(checkpoint_filter_fn)

    def __init__(
            self,
            num_classes: int = 10,
            in_chans: int = 3,
            global_pool: str = 'avg',
            scales: Sequence[int] = (1, 2, 3, 3),
            block_layers: Sequence[int] = (4, 4, 4, 4, 4, 4, 4, 4),
            exits_per_net: int = 2,
            base_width: int = 16,
            growth: int = 6,
            width_factors: Sequence[int] = (4, 2, 1, 1),
            bottleneck_factors: Optional[Sequence[int]] = None,
            compress: float = 0.25,
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
        factors = width_factors if bottleneck_factors is None else bottleneck_factors
        if not scales or scales[0] != 1 or any(b - a not in (0, 1) for a, b in zip(scales[:-1], scales[1:])):
            raise ValueError(
                f'scales={tuple(scales)}: start with 1, and give each sub-network the scale of the previous one or '
                'one more')
        if exits_per_net < 1 or len(block_layers) != exits_per_net * len(scales) or min(block_layers) < 1:
            raise ValueError(
                f'block_layers={tuple(block_layers)} for {len(scales)} sub-networks and exits_per_net={exits_per_net}: '
                'the last sub-network has their product of blocks; give each at least one layer')
        for name, given in (('width_factors', width_factors), ('bottleneck_factors', factors)):
            if len(given) != len(scales) or min(given) < 1:
                raise ValueError(
                    f'{name}={tuple(given)} for {len(scales)} sub-networks: give a factor of 1 or more for each')
        if base_width < 1 or growth < 1:
            raise ValueError(f'base_width={base_width}, growth={growth}: both must be 1 or more')
        if not 0 < compress < 1 or growth * min(width_factors[1:], default=growth) * compress < 1:
            raise ValueError(
                f'compress={compress} with growth={growth}: it must be a fraction in (0, 1) that leaves every fusion '
                'layer at least one channel of the lower sub-network')
        if not 0 < reduction <= 1:
            raise ValueError(f'reduction={reduction}: a transition keeps a fraction of the width in (0, 1]')
        plans = plan_blocks(
            scales, block_layers, exits_per_net, base_width, growth, width_factors, compress, reduction)

        net = StageBuilder(num_classes, global_pool, drop_rate, device, dtype)
        net.add(Stem(in_chans, [base_width * f for f in width_factors], scales, large_stem=large_stem, **kwargs))
        for plan in plans:
            if plan.low is not None:
                net.add(FusionBlock(plan, compress, factors, **kwargs))
                continue
            net.add(PlainBlock(plan, factors, **kwargs))
            width = head_width or plan.out_chs
            convs = strided_convs(plan.out_chs, width, **kwargs)
            net.add_exit(plan.out_chs, 2 ** (scales[-1] - 1) * (4 if large_stem else 1), convs, width)
        super().__init__(net.stages, net.exits, net.feature_info, num_classes, in_chans)
        self.apply(init_weights)


_PAPER = dict(
    paper_ids='arXiv:2003.07326', paper_name='Resolution Adaptive Networks for Efficient Inference')
default_cfgs = generate_default_cfgs({
    **pretrained_cfgs(
        dict(ranet_cifar=8, ranet_cifar_budgeted=6), pool_size=(2, 2), first_conv='stages.0.layers.0.convs.0.conv',
        **_PAPER),
    **imagenet_cfgs(dict(ranet_imagenet=8), **_PAPER),
})


@register_model
def ranet_cifar(pretrained: bool = False, **kwargs: Any) -> RANet:
    """Scales 1-2-3-3, 4 layers in every block: 8 exits, 16 to 94 M MACs at 32x32."""
    return build_network(RANet, 'ranet_cifar', pretrained, **kwargs)


@register_model
def ranet_cifar_budgeted(pretrained: bool = False, **kwargs: Any) -> RANet:
    """Scales 1-2-3, 2k layers in block k: 6 exits, 8 to 59 M MACs at 32x32."""
    args = dict(scales=(1, 2, 3), block_layers=(2, 4, 6, 8, 10, 12), width_factors=(4, 2, 1))
    return build_network(RANet, 'ranet_cifar_budgeted', pretrained, **dict(args, **kwargs))


@register_model
def ranet_imagenet(pretrained: bool = False, **kwargs: Any) -> RANet:
    """The paper's ImageNet network, scales 1-2-3-4: 8 exits, 245 to 2,823 M MACs at 224x224."""
    args = dict(
        scales=(1, 2, 3, 4), block_layers=(8,) * 8, base_width=32, growth=16, width_factors=(4, 2, 2, 1),
        head_width=None, large_stem=True)
    return build_network(RANet, 'ranet_imagenet', pretrained, **dict(args, **kwargs))
