"""MSFuse: the costs of the paper's network, how its layers are connected, its exits."""
import copy

import pytest
import timm
import torch
from conftest import SMALL

from timm_multiexit.models._costs import exit_costs
from timm_multiexit.models._multiscale import Transition, scale_schedule
from timm_multiexit.models.msfuse import FusionLayer, Stem

COSTS = {
    'msfuse_cifar': ([15.26, 23.32, 33.58, 40.65, 49.05, 57.60, 64.22], 5_051_958),
    'msfuse_cifar.cifar100': ([15.27, 23.34, 33.61, 40.69, 49.10, 57.67, 64.30], 5_133_228),
    'msfuse_cifar_budgeted': ([7.42, 13.26, 25.55, 37.56, 52.65], 3_588_042),
}


@pytest.mark.parametrize('name', COSTS)
def test_costs_of_the_paper(name):
    macs, params = COSTS[name]
    model = timm.create_model(name)
    costs = exit_costs(model)
    assert [round(m / 1e6, 2) for m in costs.macs] == macs
    assert costs.params[-1] == params == sum(p.numel() for p in model.parameters())


def test_schedule_drops_a_scale_after_each_third():
    assert scale_schedule(16, 3) == (3,) * 6 + (2,) * 6 + (1,) * 4
    assert scale_schedule(15, 3) == (3,) * 5 + (2,) * 5 + (1,) * 5


def layers_of(model, kind):
    return [m for m in model.modules() if isinstance(m, kind)]


def test_every_scale_reads_the_finer_one_of_the_same_layer():
    """Changing only what scale s-1 *adds* in a layer changes scale s of that layer; in MSDNet it would not."""
    torch.manual_seed(0)
    model = timm.create_model('msfuse_cifar').eval()
    layer = layers_of(model, FusionLayer)[1]
    state = [torch.rand(2, c, r, r) for c, r in zip((44, 88, 176), (16, 8, 4))]
    with torch.no_grad():
        before = layer(state)
        layer.finest.conv2.bn.bias += 1.  # affects only the new channels of the finest scale
        after = layer(state)
    assert torch.equal(after[0][:, :44], before[0][:, :44])
    assert not torch.allclose(after[0][:, 44:], before[0][:, 44:])
    for s in (1, 2):  # scale 3 through scale 2 of this layer
        new, old = (maps[s][:, state[s].shape[1]:] for maps in (after, before))
        half = new.shape[1] // 2
        assert not torch.allclose(new[:, :half], old[:, :half]), f'scale {s + 1} does not read scale {s} of its layer'
        torch.testing.assert_close(new[:, half:], old[:, half:])  # its own branch reads only the previous layer


def test_finer_scales_read_no_coarser_one():
    layer = layers_of(timm.create_model('msfuse_cifar').eval(), FusionLayer)[0]
    state = [torch.rand(1, c, r, r, requires_grad=True) for c, r in zip((32, 64, 128), (16, 8, 4))]
    layer(state)[0].sum().backward()
    assert state[0].grad is not None and state[1].grad is None and state[2].grad is None


def test_new_finest_scale_reads_only_itself_at_a_drop():
    """Stage 2 (layers 7, 8) reads two maps: nothing reads the dropped scale, so it is not in the state."""
    model = timm.create_model('msfuse_cifar').eval()
    state = [torch.rand(1, 3, 32, 32)]
    shapes = []
    for stage in model.stages:
        state = stage(state)
        shapes.append([tuple(x.shape[1:]) for x in state])
    assert shapes[0] == [(80, 16, 16), (160, 8, 8), (320, 4, 4)]
    assert shapes[1] == [(208, 8, 8), (416, 4, 4)]
    assert shapes[4] == [(472, 4, 4)]
    assert shapes[6] == [(404, 4, 4)]


def test_transition_after_the_first_layer_of_a_block():
    model = timm.create_model('msfuse_cifar')
    names = [type(layer).__name__ for stage in model.stages for layer in stage.layers]
    fusion = [i for i, n in enumerate(names) if n == 'FusionLayer']
    assert [i for i, n in enumerate(names) if n == 'Transition'] == [fusion[6] + 1, fusion[12] + 2 - 1]
    assert [c.out_channels for t in layers_of(model, Transition) for c in t.convs] == [116, 232, 260]


def test_stem_adds_the_first_convolution_without_activation():
    torch.manual_seed(0)
    stem = Stem(3, 8, (1, 2, 4), out_scales=3).eval()
    seen = {}
    for name in ('conv1', 'conv3'):
        getattr(stem, name).register_forward_hook(lambda m, i, o, name=name: seen.update({name: o}))
    stem.conv4.register_forward_pre_hook(lambda m, i: seen.update(conv4=i[0]))
    maps = stem([torch.randn(2, 3, 32, 32)])
    torch.testing.assert_close(seen['conv4'], seen['conv1'] + seen['conv3'])
    assert [tuple(x.shape[1:]) for x in maps] == [(8, 16, 16), (16, 8, 8), (32, 4, 4)]
    assert stem.conv2.conv.groups == stem.conv4.conv.groups == 8 and stem.conv3.conv.kernel_size == (1, 1)


@pytest.mark.parametrize('kwargs', [
    dict(steps=(1, 1)), dict(steps=(1, 2, 3), scale_factors=(1, 2)), dict(steps=(3, 3), scale_factors=(1, 2, 4, 8)),
    dict(base_width=16, growth=6), dict(act_layer='gelu'), dict(steps=(1, 1, 1), bottleneck_factors=(2, 2, 2)),
])
def test_other_configurations_train(kwargs):
    model = timm.create_model('msfuse_cifar', num_classes=7, **kwargs).train()
    model.set_exit_training(True)
    logits = model(torch.randn(2, 3, 32, 32))
    assert [tuple(x.shape) for x in logits] == [(2, 7)] * model.num_exits
    sum(x.sum() for x in logits).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize('kwargs', [dict(steps=()), dict(steps=(2, 0)), dict(bottleneck_factors=(1, 2))])
def test_impossible_configurations_are_refused(kwargs):
    with pytest.raises(ValueError):
        timm.create_model('msfuse_cifar', **kwargs)


def test_modes_of_forward(small_msfuse):
    model, x = small_msfuse, torch.randn(4, 3, 32, 32)
    exits = model.forward_exits(x)
    assert torch.equal(model(x), exits[-1])
    model.train()
    for m in model.modules():  # batch statistics would change from call to call
        if isinstance(m, torch.nn.BatchNorm2d):
            m.eval()
    torch.testing.assert_close(model(x), torch.stack(exits).mean(0))
    model.set_exit_training(True)
    trained = model(x)
    assert isinstance(trained, tuple)
    for a, b in zip(trained, exits):
        torch.testing.assert_close(a, b)
    assert torch.is_tensor(model.eval()(x))


def test_iter_exits_computes_only_the_exits_requested(network):
    calls = []
    for kind, modules in (('stage', network.stages), ('exit', network.exits)):
        for k, module in enumerate(modules):
            module.register_forward_hook(lambda m, i, o, kind=kind, k=k: calls.append((kind, k)))
    x = torch.randn(2, *network.pretrained_cfg['input_size'])
    with torch.inference_mode():
        exits = network.iter_exits(x)
        assert calls == []
        logits = []
        for k in range(network.num_exits):
            logits.append(next(exits))
            assert calls == [(kind, j) for j in range(k + 1) for kind in ('stage', 'exit')]
        assert next(exits, None) is None
        calls.clear()
        early = network.iter_exits(x)
        next(early)
        early.close()
        assert calls == [('stage', 0), ('exit', 0)]
        for one, all_at_once in zip(logits, network.forward_exits(x)):
            torch.testing.assert_close(one, all_at_once, rtol=0, atol=1e-5)


def test_pruning_with_the_head_kept_is_a_shorter_network(small_msfuse):
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = small_msfuse.forward_exits(x)[1]
        small_msfuse.prune_intermediate_layers([1], prune_head=False)
        torch.testing.assert_close(small_msfuse(x), expected)
    assert small_msfuse.num_exits == 2


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError):
        timm.create_model('msfuse_cifar', **SMALL, no_such_argument=1)


def test_checkpointed_stages_can_be_compiled(small_msfuse):
    plain = small_msfuse.train()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected, found = plain(x), torch.compile(saving, backend='aot_eager')(x)
    torch.testing.assert_close(found, expected)
    expected.sum().backward()
    found.sum().backward()
    for ours, theirs in zip(saving.parameters(), plain.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-3)
    for ours, theirs in zip(saving.buffers(), plain.buffers()):  # statistics have moved once
        torch.testing.assert_close(ours, theirs)
