"""What every network of the package satisfies: the contract of stages, states and exits, initialisation, arguments."""
import copy
import math

import pytest
import timm
import torch
from conftest import NETWORKS, SMALL, SMALL_NETWORKS
from timm.models import generate_default_cfgs
from torch import nn

from timm_multiexit.models import MultiExitNet, _pretrained
from timm_multiexit.models._costs import exit_costs


def images(network, batch=2, size=None):
    chans, *full = network.pretrained_cfg['input_size']
    return torch.randn(batch, chans, *(size or full))


@pytest.fixture(scope='module', params=NETWORKS)
def settled(request):
    """Every network, its BN statistics fitted to random images: otherwise maps drift with depth, and channels die."""
    network = timm.create_model(request.param).train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.
    with torch.no_grad():
        network.forward_exits(images(network, batch=32))
    return network.eval()


def states_of(network, x):
    """The state after each stage."""
    states, state = [], [x]
    for stage in network.stages:
        state = stage(state)
        states.append(state)
    return states


def test_a_name_without_tag_means_cifar10(network):
    """timm takes the first tag with weights: CIFAR-10 comes first."""
    assert network.pretrained_cfg['tag'] == 'cifar10'
    assert network.num_classes == 10


def test_eval_forward_is_the_last_exit(network):
    x = images(network)
    with torch.no_grad():
        exits = network.forward_exits(x)
        assert torch.equal(network(x), exits[-1])
    assert isinstance(network, MultiExitNet)
    assert [tuple(logits.shape) for logits in exits] == [(2, network.num_classes)] * network.num_exits
    assert all(torch.isfinite(logits).all() for logits in exits)
    assert len(network.stages) == len(network.exits) == len(network.feature_info) == network.num_exits > 1


def test_feature_info_describes_what_the_exits_read(network):
    x = images(network)
    with torch.no_grad():
        states = states_of(network, x)
    for state, head, info in zip(states, network.exits, network.feature_info):
        assert state[-1].shape[1] == info['num_chs'] == head.in_chs
        assert state[-1].shape[2] * info['reduction'] == x.shape[2]


def assert_all_is_read(network, x):
    """Every channel of every map in a state affects a later exit or, in the last map, the exit of this stage."""
    with torch.no_grad():
        states = states_of(network, x)
    for k, state in enumerate(states):
        state = [m.detach().requires_grad_() for m in state]
        own = network.exits[k](state[-1]).square().sum()
        later, below = [], state
        for stage, head in zip(network.stages[k + 1:], network.exits[k + 1:]):
            below = stage(below)
            later.append(head(below[-1]).square().sum())
        grads = torch.autograd.grad(sum(later, own), state, allow_unused=True)
        assert all(grad is not None for grad in grads), f'a map of the state after stage {k} is never read'
        for i, grad in enumerate(grads):
            unread = (grad.abs().amax((0, 2, 3)) == 0).nonzero().flatten().tolist()
            assert not unread, f'channels {unread} of map {i} after stage {k} are never read'
        assert torch.autograd.grad(network.exits[k](state[-1]).square().sum(), state[-1])[0].abs().sum() > 0
        if k == len(states) - 1:
            assert len(state) == 1


def test_a_state_holds_nothing_that_is_not_read(settled):
    assert_all_is_read(settled, images(settled, batch=8))


def test_a_pruned_network_computes_nothing_for_removed_exits(settled):
    network = copy.deepcopy(settled)
    x = images(network, batch=8)
    middle = network.num_exits // 2
    with torch.no_grad():
        expected = network.forward_exits(x)[middle]
    network.prune_intermediate_layers([middle], prune_head=False)
    with torch.no_grad():
        torch.testing.assert_close(network(x), expected)
    assert_all_is_read(network, x)


def test_finished_images_can_be_dropped_after_any_stage(settled):
    x = images(settled, batch=4)
    with torch.no_grad():
        expected = settled.forward_exits(x)
        left = torch.arange(4)
        state = [x]
        for k, (stage, head) in enumerate(zip(settled.stages, settled.exits)):
            state = stage(state)
            torch.testing.assert_close(head(state[-1]), expected[k][left], rtol=1e-4, atol=1e-4)
            if len(left) > 1:
                keep = torch.arange(len(left)) != k % len(left)
                left, state = left[keep], [m[keep] for m in state]


@pytest.mark.parametrize('size', [(48, 80), (37, 45)])
def test_any_image_size(network, size):
    with torch.no_grad():
        exits = network.forward_exits(images(network, size=size))
    assert all(logits.shape == (2, network.num_classes) and torch.isfinite(logits).all() for logits in exits)


def test_every_parameter_of_every_exit_is_trained(network):
    network.train().set_exit_training(True)
    exits = network(images(network, batch=8))  # in two images a channel may be dead in both
    assert isinstance(exits, tuple)
    sum(logits.square().sum() for logits in exits).backward()
    assert [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_costs_grow_from_exit_to_exit(network):
    costs = exit_costs(network)
    assert list(costs.macs) == sorted(set(costs.macs)) and list(costs.params) == sorted(set(costs.params))
    assert costs.params[-1] == sum(p.numel() for p in network.parameters())


def test_initialisation(network):
    """Statistics of every parameter, within five standard errors; every layer with parameters is of a known kind."""
    kinds = set()
    for name, module in network.named_modules():
        if not list(module.parameters(recurse=False)):
            continue
        kind = next((k for k in (nn.Conv2d, nn.BatchNorm2d, nn.Linear) if isinstance(module, k)), None)
        assert kind is not None, f'{name}: this test does not know how {type(module).__name__} is initialised'
        kinds.add(kind)
        weight, count = module.weight.detach(), module.weight.numel()
        if kind is nn.BatchNorm2d:
            assert torch.all(weight == 1) and torch.all(module.bias == 0), name
            continue
        if kind is nn.Conv2d:
            assert module.bias is None, name
            std = math.sqrt(2 / (math.prod(module.kernel_size) * module.out_channels / module.groups))
            spread = std / math.sqrt(2 * count)
            # A normal distribution has 0.3 % beyond three standard deviations, a uniform one has none.
            assert count < 20_000 or (weight.abs() > 3 * std).sum() > 0, name
        else:
            assert torch.all(module.bias == 0), name
            bound = 1 / math.sqrt(module.in_features)
            std = bound / math.sqrt(3)
            spread = std * math.sqrt(0.2 / count)  # of a uniform distribution: kurtosis 1.8
            assert weight.abs().max() <= bound, name
        assert abs(weight.std(correction=0).item() - std) < 5 * spread, name
        assert abs(weight.mean().item()) < 5 * std / math.sqrt(count), name
    assert kinds == {nn.Conv2d, nn.BatchNorm2d, nn.Linear}


def test_depthwise_convolutions_are_initialised_by_their_own_fan():
    """Fan-out counts the outputs that one input reaches, k * k of them, not k * k * channels."""
    torch.manual_seed(0)
    network = timm.create_model('msfuse_cifar', **{**SMALL, 'base_width': 512})
    depthwise = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert [m.groups for m in depthwise] == [512, 512]
    for conv in depthwise:
        assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / 9), rel=0.05)


@pytest.mark.parametrize('name', NETWORKS)
def test_unknown_arguments_are_refused(name):
    with pytest.raises(TypeError, match='no_such_argument'):
        timm.create_model(name, no_such_argument=1)


@pytest.mark.parametrize('name', NETWORKS)
def test_arguments_that_all_networks_have(name):
    network = timm.create_model(
        name, device='meta', dtype=torch.float64, num_classes=7, in_chans=1, drop_rate=0.5, act_layer='gelu')
    tensors = dict(network.named_parameters()) | dict(network.named_buffers())
    assert {t.device.type for t in tensors.values()} == {'meta'}
    assert {t.dtype for n, t in tensors.items() if not n.endswith('num_batches_tracked')} == {torch.float64}
    assert [c.out_features for c in network.get_classifier()] == [7] * network.num_exits
    assert all(head.drop.p == 0.5 for head in network.exits)
    assert not any(isinstance(m, nn.ReLU) for m in network.modules())
    first_conv = network.get_submodule(network.pretrained_cfg['first_conv'])
    assert first_conv.in_channels == 1


def test_a_network_of_another_depth_names_its_own_classifiers():
    model = timm.create_model('msfuse_cifar', **dict(SMALL, steps=(1,) * 8))
    assert model.pretrained_cfg['classifier'] == tuple(f'exits.{k}.fc' for k in range(8))
    assert len(timm.create_model('msfuse_cifar').pretrained_cfg['classifier']) == 7


@pytest.mark.parametrize('name', SMALL_NETWORKS)
def test_gradient_checkpointing_changes_nothing(name):
    """Its second forward pass would update BN statistics a second time."""
    plain = timm.create_model(name, **SMALL_NETWORKS[name]).train()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    x = images(plain, batch=4)
    for network in (plain, saving):
        for _ in range(2):
            network(x).sum().backward()
    for a, b in zip(plain.buffers(), saving.buffers()):
        assert torch.equal(a, b)
    for a, b in zip(plain.parameters(), saving.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


def test_the_default_tag_is_the_first_data_set_s_whichever_weights_are_there(tmp_path, monkeypatch):
    monkeypatch.setattr(_pretrained, 'WEIGHTS_DIR', tmp_path)
    (tmp_path / 'some_net.cifar100').mkdir()
    (tmp_path / 'some_net.cifar100' / 'model.safetensors').touch()
    cfg = generate_default_cfgs(_pretrained.pretrained_cfgs(dict(some_net=2)))['some_net']
    assert list(cfg.tags) == ['cifar10', 'cifar100']
    assert not cfg.default.has_weights and cfg.cfgs['cifar100'].has_weights
