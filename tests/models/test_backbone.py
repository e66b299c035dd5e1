"""Exits on timm models: the last exit stays the model's own, images can be dropped, and bad use is refused."""
import copy
import pickle
import re
from types import SimpleNamespace

import pytest
import timm
import torch
from backbone_support import difference, enliven, exits_with_drops, lively, photos
from safetensors.torch import save_file
from timm.models import group_parameters
from timm.models._hub import save_for_hf
from timm.utils import reparameterize_model
from torch import nn

from timm_multiexit import EarlyExitRunner, InputError, add_exits, exit_costs
from timm_multiexit.models import MultiExitNet
from timm_multiexit.models._fold import fold, merge_branches
from timm_multiexit.models._taps import as_map
from timm_multiexit.stopping.policy import ALWAYS, ExitPolicy, scores
from timm_multiexit.training.task import MultiExitTask

# What people use at the edge, small: name, size of the images, arguments.
SMALL_VIT = dict(img_size=64, embed_dim=48, num_heads=3, depth=6)
EDGE = [
    ('resnet18', 32, {}),
    ('mobilenetv3_small_050', 32, {}),
    ('efficientnet_lite0', 32, {}),
    ('convnext_atto', 32, {}),
    ('vit_tiny_patch16_224', 64, SMALL_VIT),
    ('deit_tiny_distilled_patch16_224', 64, SMALL_VIT),
    ('swin_tiny_patch4_window7_224', 56, dict(img_size=56, embed_dim=24, depths=(1, 1, 4, 1))),
    ('mobilevit_xxs', 32, {}),
    ('fastvit_t8', 32, {}),
    ('repvit_m0_9', 32, {}),
    ('starnet_s050', 32, {}),
]
IDS = [name for name, _, _ in EDGE]
# Several tensors alive at a cut, or sizes that cross it.
AWKWARD = [('xception41p', 64, {}), ('pit_ti_224', 224, {}), ('crossvit_tiny_240', 240, {}),
           ('twins_svt_small', 224, {}), ('mvitv2_tiny', 64, dict(img_size=64))]


def make(case):
    name, size, kwargs = case
    return lively(name, (3, size, size), **kwargs)


@pytest.fixture(scope='module', params=EDGE, ids=IDS)
def edge(request):
    """A backbone, the same with exits, and the size of images."""
    model, size = make(request.param)
    return copy.deepcopy(model), add_exits(model), size


@torch.no_grad()
def test_the_last_exit_is_the_model_to_the_bit(edge):
    model, net, size = edge
    for batch in (1, 7, 64):
        x = photos(batch, size)
        assert torch.equal(net(x), model(x))
        assert torch.equal(net.forward_exits(x)[-1], model(x))


@torch.no_grad()
def test_images_can_be_dropped_between_stages(edge):
    """In double precision: the rounding of a batch of another size is amplified by random weights."""
    model, net, size = (copy.deepcopy(part).double() if isinstance(part, nn.Module) else part for part in edge)
    x = photos(7, size).double()
    alone = torch.cat([model(image[None]) for image in x])
    exits = net.forward_exits(x)
    for (left, logits), every in zip(exits_with_drops(net, x), exits):
        assert difference(logits, every[left]) < 1e-9
    assert difference(logits, alone[left]) < 1e-9


@torch.no_grad()
def test_other_precision_and_memory_format(edge):
    model, net, size = edge
    x = photos(7, size)
    for change in (dict(dtype=torch.bfloat16), dict(memory_format=torch.channels_last)):
        ours, theirs, images = copy.deepcopy(net).to(**change), copy.deepcopy(model).to(**change), x.to(**change)
        assert torch.equal(ours(images), theirs(images))


def test_what_the_network_is_made_of(edge):
    model, net, size = edge
    assert isinstance(net, MultiExitNet) and net.num_exits == 4 and len(set(net.taps)) == 3
    state = net.state_dict()
    assert {k.removeprefix('backbone.') for k in state if k.startswith('backbone.')} == set(model.state_dict())
    assert {k.split('.')[0] for k in state} == {'backbone', 'exits'}
    assert set(dict(net.named_parameters())) <= set(state)
    costs = exit_costs(net, size)
    assert list(costs.macs) == sorted(set(costs.macs)) and list(costs.params) == sorted(set(costs.params))
    assert costs.params[-1] == sum(p.numel() for p in merge_branches(net).parameters())
    with torch.no_grad():
        maps = net.forward_intermediates(photos(2, size), intermediates_only=True)
    assert [m.shape[1] for m in maps] == [info['num_chs'] for info in net.feature_info]
    assert all(m.ndim == 4 for m in maps)


def test_a_network_whose_taps_are_swapped_is_found_out():
    """The comparison is a real one: two stages in the wrong order change the logits."""
    model, size = lively('vit_tiny_patch16_224', (3, 64, 64), **SMALL_VIT)
    net = add_exits(copy.deepcopy(model))
    x = photos(7, size)
    net.stages[1], net.stages[2] = net.stages[2], net.stages[1]
    with torch.no_grad():
        assert difference(net(x), model(x)) > 0.1


def test_an_untrained_network_is_not_compared():
    model = timm.create_model('starnet_s050').eval()
    with torch.no_grad(), pytest.raises(AssertionError, match='hardly depend'):
        difference(*2 * (model(torch.randn(4, 3, 64, 64)),))


@pytest.mark.parametrize('case', AWKWARD, ids=[name for name, _, _ in AWKWARD])
@torch.no_grad()
def test_several_tensors_and_sizes_across_a_cut(case):
    model, size = make(case)
    model = model.double()
    net = add_exits(copy.deepcopy(model))
    x = photos(3, size).double()
    assert difference(net(x), model(x)) < 1e-9
    left, logits = exits_with_drops(net, x)[-1]
    alone = torch.cat([model(image[None]) for image in x[left]])
    assert difference(logits.repeat(2, 1), alone.repeat(2, 1)) < 1e-9 if len(left) > 1 else True


def test_a_stage_that_knows_one_image_size_refuses_others():
    net = add_exits(timm.create_model('twins_svt_small').eval())
    with pytest.raises(InputError, match=r'images of \(192, 192\) pixels: this backbone was cut for \(224, 224\)'):
        net(torch.randn(1, 3, 192, 192))


@pytest.mark.parametrize('name, kwargs', [
    ('vit_tiny_patch16_224', dict(SMALL_VIT, drop_path_rate=0.3, proj_drop_rate=0.2, attn_drop_rate=0.2)),
    ('efficientnet_lite0', dict(drop_path_rate=0.3)),
    ('deit_tiny_distilled_patch16_224', SMALL_VIT),
])
def test_train_mode_is_the_models_own(name, kwargs):
    """Dropout, stochastic depth and BN statistics as without exits; the mode can change at any time."""
    model, size = lively(name, (3, 64, 64), **kwargs)
    net = add_exits(copy.deepcopy(model))
    x = photos(4, size)
    outputs = []
    for each in (model, net):
        torch.manual_seed(1)
        each.train()
        outputs.append(each(x) if each is model else each.forward_exits(x)[-1])
    assert torch.equal(*outputs)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), net.backbone.state_dict().values()))
    assert torch.equal(model.eval()(x), net.eval()(x))
    if kwargs.get('drop_path_rate'):
        assert not torch.equal(net.train().forward_exits(x)[-1], outputs[1])


def test_all_parameters_are_trained_and_a_frozen_backbone_stays():
    net = add_exits(timm.create_model('mobilevit_xxs', num_classes=5)).train()
    net.set_exit_training(True)
    outputs = net(photos(4, (3, 64, 64)))
    assert isinstance(outputs, tuple) and [tuple(o.shape) for o in outputs] == [(4, 5)] * 4
    sum(o.square().sum() for o in outputs).backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []
    before = copy.deepcopy(net.backbone.state_dict())
    net.backbone.eval()  # as a frozen one is
    net(photos(4, (3, 64, 64)))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.backbone.state_dict().values()))


@torch.no_grad()
def test_copies_pickles_and_torchscript():
    model, size = lively('vit_tiny_patch16_224', (3, 64, 64), **SMALL_VIT)
    net = add_exits(model)
    x = photos(3, size)
    expected = net.forward_exits(x)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.jit.script(net)):
        assert all(torch.equal(a, b) for a, b in zip(twin.forward_exits(x), expected))
        assert torch.equal(twin(x), expected[-1])
    twin = copy.deepcopy(net)
    for p in twin.parameters():
        p.zero_()
    assert torch.equal(net(x), expected[-1]) and twin.forward_exits(x)[0].abs().max() == 0


@torch.no_grad()
def test_normalised_features_of_the_own_head_are_a_map():
    model, size = lively('vit_tiny_patch16_224', (3, 64, 64), **SMALL_VIT)
    net = add_exits(model)
    tokens, maps = net.forward_intermediates(photos(2, size), norm=True)
    patches = tokens[:, model.num_prefix_tokens:]
    assert torch.equal(maps[-1], patches.transpose(1, 2).reshape(maps[0].shape))


@pytest.mark.parametrize('name, kwargs', [('resnet18', {}), ('vit_tiny_patch16_224', SMALL_VIT)])
@torch.no_grad()
def test_pruning_ends_the_network_at_an_exit(name, kwargs):
    model, size = lively(name, (3, 64, 64), **kwargs)
    net = add_exits(model)
    x = photos(3, size)
    expected = net.forward_exits(x)
    net.prune_intermediate_layers([1], prune_head=False)
    assert torch.equal(net(x), expected[1])
    assert sum(p.numel() for p in net.parameters()) == exit_costs(net, size).params[-1]


def test_options_of_timm_reach_the_backbone():
    model = timm.create_model('vit_tiny_patch16_224', **SMALL_VIT, drop_path_rate=0.5)
    net = add_exits(model)
    assert net.no_weight_decay() == {f'backbone.{name}' for name in model.no_weight_decay()}
    own, ours = (group_parameters(m, m.group_matcher(), reverse=True) for m in (model, net))
    assert {name: group for name, group in ours.items() if not name.startswith('exits')} == {
        f'backbone.{name}': group for name, group in own.items()}
    last = ours['backbone.norm.weight']
    assert all(group == last for name, group in ours.items() if name.startswith('exits'))
    net.set_grad_checkpointing()
    x = photos(2, (3, 64, 64))
    net.eval()
    a = net(x)
    net.set_grad_checkpointing(False)
    torch.testing.assert_close(a, net(x))


@pytest.mark.parametrize('model, kwargs, at, message', [
    ('resnet18', {}, 0, 'at=0: ResNet takes 1 to 7 early exits'),
    ('resnet18', {}, 99, 'at=99: ResNet takes 1 to 7 early exits'),
    ('resnet18', {}, [], 'name at least one module'),
    ('resnet18', {}, ['layer9'], "'layer9' is not a module of ResNet: did you mean 'layer"),
    ('resnet18', {}, ['fc'], "no exit after 'fc' of ResNet, it does not run before the head"),
    ('resnet18', {}, ['layer4'], "no exit after 'layer4' of ResNet, it is what the model's own head reads"),
    ('resnet18', {}, ['layer2', 'layer2'], "'layer2' and 'layer2' are the same place"),
    ('resnet18', {}, ['layer2', 'layer2.1'], "'layer2' and 'layer2.1' are the same place"),
    ('resnet18', dict(features_only=True), 3, 'FeatureListNet is not a timm classifier'),
    ('msfuse_cifar', {}, 3, 'MSFuse has exits already'),
    ('mobilenetv5_300m_enc', dict(channel_multiplier=0.25), 3, 'MobileNetV5Encoder is an encoder without a classifier'),
])
def test_bad_use_is_refused_in_one_line(model, kwargs, at, message):
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        add_exits(timm.create_model(model, **kwargs), at)
    assert '\n' not in str(caught.value)


def test_an_unknown_head_is_refused():
    with pytest.raises(InputError, match="unknown head 'mlp': choose one of conv, linear"):
        add_exits(timm.create_model('resnet18'), head='mlp')


def test_names_out_of_order_are_put_in_order():
    assert add_exits(timm.create_model('resnet18'), ['layer3', 'layer1.0', 'layer2']).taps == [
        'layer1.0', 'layer2', 'layer3']


@pytest.mark.parametrize('head', ['conv', 'linear'])
@pytest.mark.parametrize('name, kwargs', [
    ('resnet18', {}), ('vit_tiny_patch16_224', SMALL_VIT), ('mambaout_femto', {}), ('mobilevit_xxs', {})])
def test_models_as_they_come(name, kwargs, head):
    """Train mode is kept, half precision, one channel and no classifier are served."""
    model = timm.create_model(name, in_chans=1, num_classes=0, **kwargs).bfloat16().train()
    net = add_exits(model, 2, head)
    assert net.training and model.training and net.in_chans == 1
    x = torch.randn(2, 1, 64, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        exits = net.eval().forward_exits(x)
    assert exits[-1].shape == (2, model.head_hidden_size) and all(e.dtype == torch.bfloat16 for e in exits)
    net.reset_classifier(7)
    with torch.no_grad():
        assert [tuple(e.shape) for e in net.forward_exits(x)] == [(2, 7)] * 3


@pytest.mark.parametrize('engine', ['torch', pytest.param('onnx', marks=pytest.mark.slow('12 s each: exports'))])
@pytest.mark.parametrize('name, kwargs', [('vit_tiny_patch16_224', SMALL_VIT), ('mobilevit_xxs', {})])
def test_engines_run_it(name, kwargs, engine):
    """Costs, the runner and onnxruntime need no case of their own."""
    model, size = lively(name, (3, 64, 64), num_classes=10, **kwargs)
    model.pretrained_cfg = dict(model.pretrained_cfg, input_size=size)
    net = enliven(add_exits(model), size)
    x = photos(20, size)
    with torch.no_grad():
        exits = torch.stack(net.forward_exits(x))
    measured = [scores(x).quantile(0.6).item() for x in exits[:3]]
    policy = ExitPolicy([*measured, ALWAYS], [1.] * 4)
    run = EarlyExitRunner(net, policy, engine=engine)(x)
    assert set(run.exit_index.tolist()) == {0, 1, 2, 3}
    assert difference(run.logits, exits[run.exit_index, torch.arange(20)]) < 1e-3


@torch.no_grad()
def test_branches_of_a_backbone_are_merged_for_inference():
    model, size = lively('mobileone_s0', (3, 64, 64), num_classes=10)
    net, x = add_exits(model, at=2), photos(4, size)
    expected, merged = net.forward_exits(x), reparameterize_model(net)
    assert merged.stages.net is merged and net.stages.net is net
    costs = exit_costs(net.train())
    assert net.training and costs == exit_costs(merged)
    assert costs.params[-1] < 0.6 * sum(p.numel() for p in net.eval().parameters())
    for each, error in ((net, 0.), (merged, 1e-3), (fold(net), 1e-3)):
        for ours, theirs in zip(each.forward_exits(x), expected):
            assert difference(ours, theirs) <= error


def test_a_pruned_network_is_merged_before_or_not_at_all():
    plain, net = (add_exits(timm.create_model(name).eval(), at=2) for name in ('resnet18', 'mobileone_s0'))
    for each in (plain, net):
        each.prune_intermediate_layers([0], prune_head=False)
    reparameterize_model(plain)
    with pytest.raises(InputError, match='merge its branches first, then prune it'):
        reparameterize_model(net)
    reparameterize_model(timm.create_model('multiexit', backbone='resnet18', features_only=True))


def test_a_branch_that_an_exit_follows_is_not_merged():
    net = add_exits(timm.create_model('mobileone_s0').eval(), at=['stages.1.0.conv_kxk.0'])
    with pytest.raises(InputError, match="no stage can end with 'stages.1.0.conv_kxk.0', which does not run"):
        reparameterize_model(net)
    assert merge_branches(net) is net and exit_costs(net, (3, 64, 64)).params[-1] == sum(
        p.numel() for p in net.parameters())


@pytest.mark.parametrize('name', ['convnext_atto', 'regnetx_002', 'poolformer_s12'])
@torch.no_grad()
def test_a_head_that_pools_is_saved_and_loaded(tmp_path, name):
    net = add_exits(timm.create_model(name, num_classes=7), at=2).eval()
    save_for_hf(net, tmp_path, safe_serialization=True)
    x = photos(2, (3, 64, 64))
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(loaded(x), net(x))
    save_file({k: v for k, v in net.state_dict().items() if k != 'exits.0.fc.bias'}, tmp_path / 'model.safetensors')
    timm.create_model(f'local-dir:{tmp_path}', pretrained=True, pretrained_strict=False)


@pytest.mark.parametrize('named, shape, image_size, expected', [
    (1, (2, 197, 8), (3, 224, 224), ('NLC', 1, (14, 14))),
    (0, (2, 197, 8), (3, 224, 224), ('NLC', 1, (14, 14))),  # a class token that the model does not tell of
    (1, (2, 196, 8), (3, 224, 224), ('NLC', 0, (14, 14))),  # one that comes later
    (5, (2, 133, 8), (3, 128, 256), ('NLC', 5, (8, 16))),
    (0, (2, 64, 64, 128), (3, 256, 512), ('NCHW', 0, (64, 128))),
    (0, (2, 14, 14, 384), (3, 224, 224), ('NHWC', 0, (14, 14))),
    (0, (2, 14, 14, 14), (3, 224, 224), ('NCHW', 0, (14, 14))),
])
def test_a_tap_is_read_as_the_map_of_the_image(named, shape, image_size, expected):
    read = as_map(SimpleNamespace(num_prefix_tokens=named), shape, image_size)
    assert (read.kind, read.num_prefix_tokens, tuple(read.grid)) == expected


def test_dropout_layer_decay_and_names_of_a_backbone():
    net = add_exits(timm.create_model('vit_tiny_patch16_224', drop_rate=0.5, **SMALL_VIT))
    assert [head.drop.p for head in net.exits[:-1]] == [0.5] * 3
    net.backbone.group_matcher = lambda coarse=False: len  # of some models it is a function
    assert net.group_matcher()('backbone.ab') == 2 and net.group_matcher()('exits.0.fc.weight') == float('inf')
    assert net._model_args['backbone'].startswith('vit_tiny_patch16_224.')
    net.backbone.pretrained_cfg['tag'] = 'mine'
    assert net._model_args['backbone'] == 'vit_tiny_patch16_224'


def test_tokens_are_of_one_image_size():
    net = add_exits(timm.create_model('vit_tiny_patch16_224', dynamic_img_size=True, **SMALL_VIT))
    for run in (net.forward_exits, lambda x: exit_costs(net, x.shape[1:])):
        with pytest.raises(InputError, match=r'images of \(128, 128\) pixels: this backbone was cut for'):
            run(torch.randn(2, 3, 128, 128))


def test_costs_of_a_frozen_backbone():
    net = add_exits(timm.create_model('resnet10t'))
    expected = exit_costs(net, (3, 64, 64))
    net.backbone.requires_grad_(False).eval()
    assert exit_costs(net, (3, 64, 64)) == expected
    assert net.training and net.exits.training and not net.backbone.training


@pytest.mark.parametrize('name, kwargs, head', [
    ('resnet10t', {}, ('fc.',)), ('vit_tiny_patch16_224', SMALL_VIT, ('head.',)), ('convnext_atto', {}, ('head.',))])
def test_the_exits_hold_the_backbone_s_head_and_no_more(name, kwargs, head):
    net = add_exits(timm.create_model(name, **kwargs))
    net.requires_grad_(False)
    net.exits.requires_grad_(True)
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in net.named_parameters()
                       if name.startswith(('exits.', *(f'backbone.{part}' for part in head)))}


def test_a_frozen_stage_keeps_its_statistics():
    net = add_exits(timm.create_model('resnet10t'), at=2)
    task = MultiExitTask(net, frozen=['stages.0']).train()
    before = copy.deepcopy(net.state_dict())
    net(torch.randn(4, 3, 64, 64))
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert net.taps[0] == 'conv1' and not any(name.startswith('backbone.conv1.') for name in moved)
    assert 'backbone.bn1.running_mean' in moved and task.training
