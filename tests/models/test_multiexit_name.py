"""`multiexit` in timm's registry: built, saved, loaded back without the network, given other classes and channels."""
import json
import socket

import pytest
import timm
import torch
from backbone_support import enliven, photos
from timm.models import load_checkpoint
from timm.models._hub import save_for_hf

from timm_multiexit import InputError, load_model
from timm_multiexit.models import MultiExitBackbone
from timm_multiexit.training.options import parse_train_args
from timm_multiexit.training.trainer import create_network

SMALL = dict(backbone='vit_tiny_patch16_224', img_size=64, embed_dim=48, num_heads=3, depth=6)


@pytest.fixture
def offline(monkeypatch):
    """No connection leaves this process."""
    def refuse(*args, **kwargs):
        raise AssertionError(f'a connection to {args[-1]}')
    monkeypatch.setattr(socket.socket, 'connect', refuse)
    monkeypatch.setattr(socket, 'getaddrinfo', refuse)


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    net = timm.create_model('multiexit', at=2, num_classes=5, drop_path_rate=0.1, **SMALL)
    enliven(net, (3, 64, 64))
    save_for_hf(net, tmp_path, safe_serialization=True)
    return net, tmp_path


@torch.no_grad()
def test_it_comes_back_as_it_was(saved, offline):
    net, folder = saved
    config = json.loads((folder / 'config.json').read_text())
    assert config['architecture'] == 'multiexit'
    args = config['model_args']
    assert args['backbone'].startswith('vit_tiny_patch16_224') and args['at'] == net.taps == ['blocks.0', 'blocks.3']
    x = photos(3, (3, 64, 64))
    for back in (timm.create_model(f'local-dir:{folder}', pretrained=True).eval(), load_model(f'local-dir:{folder}')):
        assert isinstance(back, MultiExitBackbone) and back.taps == net.taps
        assert all(torch.equal(a, b) for a, b in zip(net.forward_exits(x), back.forward_exits(x)))
        ours, theirs = (timm.data.resolve_model_data_config(m) for m in (back, net))
        assert {k: tuple(v) if isinstance(v, list) else v for k, v in ours.items()} == theirs
        assert back.pretrained_cfg['input_size'] == (3, 64, 64)


@torch.no_grad()
def test_stored_weights_take_other_classes_and_channels(saved, offline):
    net, folder = saved
    other = timm.create_model(f'local-dir:{folder}', pretrained=True, num_classes=7, in_chans=1).eval()
    assert [tuple(e.shape) for e in other.forward_exits(torch.randn(2, 1, 64, 64))] == [(2, 7)] * 3
    assert torch.equal(other.backbone.blocks[3].attn.qkv.weight, net.backbone.blocks[3].attn.qkv.weight)


def test_a_backbone_of_ones_own(tmp_path, offline):
    """Its weights are loaded with `pretrained`, and the name that is stored does not lead to this folder."""
    own = timm.create_model('resnet10t', num_classes=4, in_chans=1)
    save_for_hf(own, tmp_path, safe_serialization=True)
    net = timm.create_model('multiexit', backbone=f'local-dir:{tmp_path}', pretrained=True)
    assert torch.equal(net.backbone.conv1[0].weight, own.conv1[0].weight)
    assert net.num_classes == 4 and net.in_chans == 1 and net._model_args['backbone'].startswith('resnet10t')
    assert net.pretrained_cfg['input_size'][0] == 1


def test_a_cfg_without_weights_leaves_the_backbones_own():
    """timm's scripts hand ImageNet's mean and 224 pixels to every backbone."""
    own = timm.get_pretrained_cfg('mobilevit_xxs')
    for kwargs in ({}, timm.models.resolve_model_input_args('multiexit', backbone='mobilevit_xxs')):
        kwargs = {k: v for k, v in kwargs.items() if k not in ('model_name', 'backbone')}
        net = timm.create_model('multiexit', backbone='mobilevit_xxs', **kwargs)
        config = timm.data.resolve_model_data_config(net)
        assert (config['mean'], config['std'], config['input_size'], config['crop_pct']) == (
            own.mean, own.std, own.input_size, own.crop_pct)
    assert own.mean == (0., 0., 0.)


def test_registered_cfgs_stay_as_they_are():
    """timm shares them between networks."""
    before = timm.get_pretrained_cfg('mobilevit_xxs').to_dict()
    timm.create_model('multiexit', backbone='mobilevit_xxs', num_classes=3, in_chans=1).pretrained_cfg['mean'] = None
    assert timm.get_pretrained_cfg('mobilevit_xxs').to_dict() == before


@pytest.mark.parametrize('kwargs, error', [
    (dict(backbone='no_such_network'), "unknown backbone 'no_such_network': choose one"),
    (dict(backbone='resnet_18.a1_in1k'), "unknown backbone 'resnet_18.a1_in1k': did you mean resnet18"),
    (dict(backbone='msfuse_cifar'), 'MSFuse has exits already'),
    (dict(backbone='multiexit'), 'MultiExitBackbone has exits already'),
    (dict(at=['nowhere']), "'nowhere' is not a module"),
])
def test_bad_arguments(kwargs, error):
    with pytest.raises(InputError, match=error):
        timm.create_model('multiexit', **kwargs)


@pytest.mark.parametrize('kwargs', [
    dict(model_name='multiexit.cifar100'), dict(model_name='multiexit', pretrained_cfg='cifar100')])
def test_a_tag_is_refused(kwargs):
    with pytest.raises(InputError, match="multiexit has no tag 'cifar100': leave it out"):
        timm.create_model(**kwargs, **SMALL)
    args = parse_train_args('', ['--model', 'multiexit.cifar100', '--model-kwargs', 'backbone=resnet10t'])
    with pytest.raises(InputError, match="cannot be created .multiexit has no tag 'cifar100': leave it out"):
        create_network(args, 2)


def test_weights_that_an_overlay_names(saved, offline):
    net, folder = saved
    overlay = dict(file=str(folder / 'model.safetensors'), num_classes=5)
    back = timm.create_model(
        'multiexit', pretrained=True, at=2, pretrained_cfg=None, pretrained_cfg_overlay=overlay, **SMALL)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), back.state_dict().values()))


def test_a_checkpoint_of_the_network(saved, tmp_path):
    net, _ = saved
    torch.save(dict(state_dict=net.state_dict()), tmp_path / 'last.pth.tar')
    back = timm.create_model('multiexit', at=2, num_classes=5, **SMALL)
    load_checkpoint(back, str(tmp_path / 'last.pth.tar'))
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), back.state_dict().values()))
