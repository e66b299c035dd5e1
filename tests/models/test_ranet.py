"""RANet: the published costs and block widths, what is fused with what, resizing, and the places of the exits."""
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from timm_multiexit.models._costs import exit_costs
from timm_multiexit.models.ranet import Block, FusionBlock, FusionLayer, PlainBlock, plan_blocks

COSTS = {
    'ranet_cifar': (
        ['15.74', '31.17', '44.46', '50.15', '60.31', '63.30', '89.52', '94.25'],
        ['0.470', '1.074', '1.477', '1.868', '2.166', '2.453', '2.872', '3.262']),
    'ranet_cifar_budgeted': (['8.32', '21.69', '32.70', '41.35', '52.92', '58.61'], ['2.548']),
}
DEFAULTS = dict(
    scales=(1, 2, 3, 3), block_layers=(4,) * 8, exits_per_net=2, base_width=16, growth=6, width_factors=(4, 2, 1, 1),
    compress=0.25, reduction=0.5)


@pytest.mark.parametrize('name', COSTS)
def test_published_costs(name):
    macs, params = COSTS[name]
    costs = exit_costs(timm.create_model(name))
    assert [f'{m / 1e6:.2f}' for m in costs.macs] == macs
    assert [f'{p / 1e6:.3f}' for p in costs.params[-len(params):]] == params


def by_net(plans, value):
    return [[value(p) for p in plans if p.net == net] for net in range(plans[-1].net + 1)]


def test_published_block_widths_and_places():
    plans = plan_blocks(**DEFAULTS)
    assert by_net(plans, lambda p: p.in_chs) == [
        [64, 160], [32, 100, 92, 140], [16, 50, 46, 87, 69, 93], [16, 50, 46, 87, 138, 101, 156, 180]]
    assert by_net(plans, lambda p: p.growth) == [[24] * 2, [12] * 4, [6] * 6, [6] * 8]
    numbers = [[p.index + 1 for p in plans if p.net == net and p.down] for net in range(4)]
    assert numbers == [[], [2], [2, 4], [4, 6]]
    numbers = [[p.index + 1 for p in plans if p.net == net and p.transition] for net in range(4)]
    assert numbers == [[], [2], [2, 4], [2, 5]]


@pytest.fixture(scope='module')
def ran():
    """A RANet, and the inputs and outputs of each of its modules in one run."""
    torch.manual_seed(0)
    model = timm.create_model('ranet_cifar').eval()
    seen = {}
    for module in model.modules():
        module.register_forward_hook(lambda m, args, out: seen.update({m: (args, out)}))
    with torch.no_grad():
        model.forward_exits(torch.randn(2, 3, 32, 32))
    return model, seen


def blocks_of(model):
    """Blocks of each sub-network."""
    blocks = [layer for stage in model.stages for layer in stage.layers if isinstance(layer, Block)]
    cuts = (0, 2, 6, 12, 20)
    return [blocks[a:b] for a, b in zip(cuts[:-1], cuts[1:])]


def layer_inputs(block, seen):
    """What each layer of a block reads of its own sub-network."""
    return [seen[layer][0][0] for layer in block.layers]


def last_output(block, seen):
    """The output of the last layer of a block, before the block's end."""
    if isinstance(block, FusionBlock):
        return seen[block.layers[-1]][1]
    return torch.cat([seen[block.layers[-1]][0][0], seen[block.layers[-1]][1]], 1)


def test_exits_follow_the_plain_blocks_only(ran):
    model, seen = ran
    kinds = [[type(layer) for layer in stage.layers if isinstance(layer, Block)] for stage in model.stages]
    assert [k[-1] for k in kinds] == [PlainBlock] * 8
    assert [k.count(FusionBlock) for k in kinds] == [0, 0, 2, 0, 4, 0, 6, 0]
    assert sum(len(k) for k in kinds) == 20
    for stage, head in zip(model.stages, model.exits):
        plain = stage.layers[-1]
        assert torch.equal(seen[head][0][0], last_output(plain, seen))
        assert seen[head][0][0].shape[2:] == (8, 8)


def test_sub_networks_start_from_one_chain_of_convolutions(ran):
    model, seen = ran
    chain = [seen[conv][1] for conv in model.stages[0].layers[0].convs]
    assert [tuple(x.shape[1:]) for x in chain] == [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)]
    for a, b in zip(chain[:-1], model.stages[0].layers[0].convs[1:]):
        assert torch.equal(seen[b][0][0], a)
    for net, x in zip(blocks_of(model), reversed(chain)):
        assert torch.equal(layer_inputs(net[0], seen)[0], x)


def test_fusion_layers_read_the_lower_layer_of_the_same_number(ran):
    model, seen = ran
    nets = blocks_of(model)
    for lower, upper in zip(nets[:-1], nets[1:]):
        assert [isinstance(block, FusionBlock) for block in upper] == [True] * len(lower) + [False] * 2
        for low, block in zip(lower, upper):
            for layer, x in zip(block.layers, layer_inputs(low, seen)):
                assert torch.equal(seen[layer][0][1], x)
            assert torch.equal(seen[block.end][0][0], last_output(low, seen))


def test_blocks_follow_each_other(ran):
    model, seen = ran
    for net in blocks_of(model):
        for block, following in zip(net[:-1], net[1:]):
            out = last_output(block, seen)
            if isinstance(block, FusionBlock):
                up = F.interpolate(seen[block.end][1], size=out.shape[2:], mode='bilinear', align_corners=True)
                out = torch.cat([out, up], 1)
                if block.transition is not None:
                    assert torch.equal(seen[block.transition][0][0], out)
                    out = seen[block.transition][1]
            assert torch.equal(layer_inputs(following, seen)[0], out)


def test_sizes_of_the_maps(ran):
    model, seen = ran
    sizes = [[last_output(block, seen).shape[-1] for block in net] for net in blocks_of(model)]
    assert sizes == [[8] * 2, [16, 8, 8, 8], [32, 16, 16, 8, 8, 8], [32, 32, 32, 16, 16, 8, 8, 8]]


@pytest.mark.parametrize('stride', [1, 2])
def test_fusion_layer(stride):
    """concat(x, B(low), B(x)): the first two resized to the last, corners aligned."""
    torch.manual_seed(0)
    layer = FusionLayer(in_chs=20, low_chs=30, growth=10, compress=0.25, factor=1, low_factor=2, stride=stride).eval()
    x, low = torch.randn(2, 20, 12, 20), torch.randn(2, 30, 5, 7)
    size = (12 // stride, 20 // stride)
    with torch.no_grad():
        y = layer(x, low)
        parts = [F.interpolate(p, size=size, mode='bilinear', align_corners=True) for p in (x, layer.low(low))]
        expected = torch.cat([*parts, layer.own(x)], 1)
    assert y.shape == (2, 30, *size)
    torch.testing.assert_close(y, expected)
    assert parts[1].shape[1] == 2  # floor(10 / 4)
    assert [m.stride for m in layer.low.modules() if isinstance(m, nn.Conv2d)] == [(1, 1), (1, 1)]
    assert layer.low.conv1.conv.out_channels == 2 * 2 and layer.own.conv1.conv.out_channels == 8


@pytest.mark.parametrize('kwargs', [
    dict(scales=(1,), block_layers=(2, 2), width_factors=(4,)),
    dict(scales=(1, 1, 2), block_layers=(1,) * 6, width_factors=(4, 4, 2), bottleneck_factors=(2, 2, 2)),
    dict(scales=(1, 2, 3, 4), width_factors=(8, 4, 2, 1), exits_per_net=2),
    dict(scales=(1, 2, 3), block_layers=(3, 2, 1), width_factors=(4, 2, 1), exits_per_net=1, reduction=0.4),
])
def test_other_configurations_train(kwargs):
    model = timm.create_model('ranet_cifar', num_classes=7, **kwargs).train()
    model.set_exit_training(True)
    logits = model(torch.randn(2, 3, 32, 32))
    assert [tuple(x.shape) for x in logits] == [(2, 7)] * len(kwargs['scales']) * kwargs.get('exits_per_net', 2)
    sum(x.sum() for x in logits).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize('kwargs', [
    dict(scales=()), dict(scales=(2, 3, 3, 3)), dict(scales=(1, 3, 3, 3)), dict(scales=(1, 2, 1, 1)),
    dict(block_layers=(4,) * 6), dict(block_layers=(4, 0) * 4), dict(exits_per_net=0), dict(width_factors=(4, 2, 1)),
    dict(bottleneck_factors=(4, 2, 1, 0)), dict(growth=0), dict(base_width=0), dict(compress=1.), dict(compress=0.1),
    dict(reduction=0),
])
def test_impossible_configurations_are_refused(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        timm.create_model('ranet_cifar', **kwargs)
