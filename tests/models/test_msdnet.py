"""MSDNet: the published costs, and which maps of the previous layer each scale of a layer reads."""
import pytest
import timm
import torch
from torch import nn

from timm_multiexit.models._costs import exit_costs
from timm_multiexit.models._multiscale import Transition
from timm_multiexit.models.msdnet import ScaleLayer

# MACs in millions, and parameters in millions where they are published for every exit.
COSTS = {
    'msdnet_cifar.cifar100': (
        ['14.97', '25.26', '36.78', '45.97', '56.93', '66.53', '75.49'],
        ['0.434', '0.877', '1.275', '1.696', '2.178', '2.603', '3.068']),
    'msdnet_cifar_budgeted.cifar100': (
        ['6.79', '14.21', '27.28', '41.37', '58.09'],
        ['0.300', '0.650', '1.018', '1.492', '2.079']),
}
LAST = {'msdnet_cifar.cifar10': ('75.41', '2.987'), 'msdnet_cifar_budgeted.cifar10': ('58.03', '2.021')}


def millions(values, digits):
    return [f'{v / 1e6:.{digits}f}' for v in values]


@pytest.mark.parametrize('name', COSTS)
def test_published_costs(name):
    costs = exit_costs(timm.create_model(name))
    assert (millions(costs.macs, 2), millions(costs.params, 3)) == COSTS[name]


@pytest.mark.parametrize('name', LAST)
def test_published_costs_of_the_last_exit(name):
    costs = exit_costs(timm.create_model(name))
    assert (*millions(costs.macs[-1:], 2), *millions(costs.params[-1:], 3)) == LAST[name]


def test_head_input_widths():
    assert [head.in_chs for head in timm.create_model('msdnet_cifar').exits] == [160, 208, 140, 188, 236, 152, 200]
    convs = [m for m in timm.create_model('msdnet_cifar').exits[0].modules() if isinstance(m, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.kernel_size, c.stride) for c in convs] == [
        (160, 128, (3, 3), (2, 2)), (128, 128, (3, 3), (2, 2))]


def layers_of(model):
    return [layer for stage in model.stages for layer in stage.layers]


def reads(out, state):
    """Numbers of the maps of the state that `out` depends on."""
    grads = torch.autograd.grad(out.square().sum(), state, retain_graph=True, allow_unused=True)
    return [i for i, grad in enumerate(grads) if grad is not None and grad.abs().sum() > 0]


def test_each_scale_reads_its_own_and_the_finer_map_of_the_previous_layer():
    torch.manual_seed(0)
    layer = layers_of(timm.create_model('msdnet_cifar').eval())[2]
    state = [torch.rand(2, c, r, r, requires_grad=True) for c, r in zip((22, 44, 88), (32, 16, 8))]
    maps = layer(state)
    assert [tuple(m.shape[1:]) for m in maps] == [(28, 32, 32), (56, 16, 16), (112, 8, 8)]
    for s, (x, y) in enumerate(zip(state, maps)):
        assert torch.equal(y[:, :x.shape[1]], x)  # dense: the input comes first
        new = y[:, x.shape[1]:]
        if s == 0:
            assert reads(new, state) == [0]
            continue
        half = new.shape[1] // 2
        assert reads(new[:, :half], state) == [s - 1] and reads(new[:, half:], state) == [s]


@pytest.mark.parametrize('number,in_chs', [(7, (52, 104, 208)), (13, (118, 236))])
def test_the_new_finest_scale_reads_the_dropped_one(number, in_chs):
    """Layers 7 and 13 of 16 still read the dropped scale but do not output it."""
    torch.manual_seed(0)
    model = timm.create_model('msdnet_cifar').eval()
    layer = [m for m in layers_of(model) if isinstance(m, ScaleLayer)][number - 1]
    state = [torch.rand(2, c, r, r, requires_grad=True) for c, r in zip(in_chs, (32, 16, 8)[-len(in_chs):])]
    maps = layer(state)
    assert len(maps) == len(state) - 1
    for s, y in enumerate(maps, 1):
        old, half = in_chs[s], (y.shape[1] - in_chs[s]) // 2
        assert torch.equal(y[:, :old], state[s])
        assert reads(y[:, old:old + half], state) == [s - 1] and reads(y[:, old + half:], state) == [s]


def test_states_and_transitions():
    """A scale is in the state until the layer that drops it; the transition halves the channels of the others."""
    model = timm.create_model('msdnet_cifar').eval()
    state, shapes = [torch.rand(1, 3, 32, 32)], []
    with torch.no_grad():
        for stage in model.stages:
            state = stage(state)
            shapes.append([tuple(x.shape[1:]) for x in state])
    assert shapes[0] == [(40, 32, 32), (80, 16, 16), (160, 8, 8)]
    assert shapes[1] == [(52, 32, 32), (104, 16, 16), (208, 8, 8)]
    assert shapes[2] == [(70, 16, 16), (140, 8, 8)]
    assert shapes[4] == [(118, 16, 16), (236, 8, 8)]
    assert shapes[5] == [(152, 8, 8)] and shapes[6] == [(200, 8, 8)]
    kinds = [type(layer) for layer in layers_of(model)]
    layer_numbers = [kinds[:i].count(ScaleLayer) for i, kind in enumerate(kinds) if kind is Transition]
    assert layer_numbers == [7, 13]
    transitions = [layer for layer in layers_of(model) if isinstance(layer, Transition)]
    assert [[(c.in_channels, c.out_channels) for c in t.convs] for t in transitions] == [
        [(58 * 2, 29 * 2), (58 * 4, 29 * 4)], [(65 * 4, 32 * 4)]]


def test_bottlenecks_use_the_factor_of_the_scale_that_they_read():
    layer = layers_of(timm.create_model('msdnet_cifar', base_width=64, bottleneck_factors=(1, 2, 3)))[1]
    widths = [layer.scales[0].own, *(b for scale in layer.scales[1:] for b in (scale.down, scale.own))]
    assert [b.conv1.conv.out_channels for b in widths] == [6, 1 * 6, 2 * 6, 2 * 12, 3 * 12]


@pytest.mark.parametrize('kwargs', [
    dict(steps=(1, 1)), dict(steps=(2, 2)), dict(steps=(1,) * 2, scale_factors=(1, 2, 4, 8)), dict(growth=2),
    dict(steps=(1, 1, 1)), dict(scale_factors=(1,)), dict(scale_factors=(1, 2, 4, 4), reduction=0.3),
    dict(bottleneck_factors=(1, 1, 1), act_layer='gelu', base_width=32, growth=16),
])
def test_other_configurations_have_no_part_that_no_exit_needs(kwargs):
    model = timm.create_model('msdnet_cifar', num_classes=7, **kwargs).train()
    model.set_exit_training(True)
    logits = model(torch.randn(2, 3, 32, 32))
    assert [tuple(x.shape) for x in logits] == [(2, 7)] * model.num_exits
    sum(x.sum() for x in logits).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize('kwargs', [
    dict(steps=()), dict(steps=(2, 0)), dict(scale_factors=()), dict(scale_factors=(1, 0, 4)), dict(growth=0),
    dict(bottleneck_factors=(1, 2)), dict(base_width=0), dict(growth=1, scale_factors=(1, 1)), dict(reduction=0),
    dict(reduction=1.5),
])
def test_impossible_configurations_are_refused(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        timm.create_model('msdnet_cifar', **kwargs)
