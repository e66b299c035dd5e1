"""Training exits on a backbone: early exits alone, the backbone first, and what each leaves unchanged."""
import argparse

import pytest
import timm
import torch
import yaml
from backbone_support import photos
from safetensors.torch import load_file, save_file
from timm.models._hub import save_for_hf

from timm_multiexit import InputError, load_model
from timm_multiexit.cli import main
from timm_multiexit.training.options import parse_train_args
from timm_multiexit.training.run import train
from timm_multiexit.training.trainer import Trainer, create_network

pytest_plugins = ['training_support']  # folder_dataset
KWARGS = ['backbone=resnet10t', 'at=2']


def options(data, output, *extra, kwargs=KWARGS):
    return parse_train_args('', [
        '--data-dir', str(data), '--dataset', 'folder', '--output', str(output), '--experiment', 'run',
        '--model', 'multiexit', '--batch-size', '40', '--validation-images', '40', '--epochs', '2', '--opt', 'adamw',
        '--lr', '0.003', '--warmup-epochs', '0', '--threads', '1', '--device', 'cpu', '--smoothing', '0', *extra,
        '--model-kwargs', *kwargs])


@pytest.fixture(scope='module')
def backbone(folder_dataset, tmp_path_factory):
    """A folder with a backbone that tells the two classes apart, trained without exits."""
    folder = tmp_path_factory.mktemp('backbone')
    train(options(folder_dataset, folder, '--regime', 'mixed', '--epochs', '6', '--backbone-epochs', '6'))
    assert main(['detach', str(folder / 'run' / 'final'), '--output', str(folder / 'plain')]) == 0
    return folder / 'plain'


def test_heads_leave_the_last_exit_as_it_was(folder_dataset, backbone, tmp_path):
    train(options(folder_dataset, tmp_path, '--regime', 'heads', '--epochs', '6', '--model-ema', '--model-ema-decay',
                  '0.5', kwargs=[f'backbone=local-dir:{backbone}', 'at=2']))
    final = tmp_path / 'run' / 'final'
    own, net = timm.create_model(f'local-dir:{backbone}', pretrained=True).eval(), load_model('', final)
    x = photos(8, (3, 32, 32))
    with torch.no_grad():
        assert torch.equal(net(x), own(x))
    reached = yaml.safe_load((final / 'history.yaml').read_text())[-1]['reached']
    assert all(reached[f'top1_exit{k}'] > 70 for k in (1, 2, 3)), reached  # two classes: chance is 50
    assert yaml.safe_load((final / 'recipe.yaml').read_text())['distill_weight'] == 1.
    # detach: the plain model again
    assert main(['detach', str(final), '--output', str(tmp_path / 'plain')]) == 0
    plain = timm.create_model(f'local-dir:{tmp_path / "plain"}', pretrained=True).eval()
    with torch.no_grad():
        assert type(plain) is type(own) and torch.equal(plain(x), own(x))
    assert plain.pretrained_cfg['mean'] == list(net.pretrained_cfg['mean'])
    assert main(['detach', str(final), '--output', str(tmp_path / 'plain')]) == 2


def test_detach_inside_the_folder_writes_beside_it(tmp_path, monkeypatch):
    net = timm.create_model('multiexit', backbone='resnet10t', at=1, num_classes=4)
    save_for_hf(net, tmp_path / 'final', safe_serialization=True)
    monkeypatch.chdir(tmp_path / 'final')
    assert main(['detach', '.']) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ['final', 'final-backbone']
    plain = timm.create_model(f'local-dir:{tmp_path / "final-backbone"}', pretrained=True)
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), net.backbone.state_dict().values()))


def test_heads_of_a_checkpoint_of_timms_train_script(folder_dataset, backbone, tmp_path):
    state, path = load_file(backbone / 'model.safetensors'), tmp_path / 'model_best.pth.tar'
    how = argparse.Namespace(input_size=None, img_size=48, mean=[.1, .2, .3], std=None, interpolation='', crop_pct=0.9)
    torch.save(dict(arch='resnet10t', state_dict=state, args=how), path)
    trainer = Trainer(options(folder_dataset, tmp_path, '--regime', 'heads', '--backbone-checkpoint', str(path)))
    trainer.train_epoch(0)
    net = trainer.task.get_trainable_module()
    after = net.backbone.state_dict()
    assert all(torch.equal(after[name], value) for name, value in state.items())
    # The images are seen as timm's script saw them; what it left to the network is the network's.
    cfg, own = net.pretrained_cfg, timm.create_model('resnet10t').pretrained_cfg
    assert tuple(cfg['input_size']) == (3, 48, 48) and tuple(cfg['mean']) == (.1, .2, .3) and cfg['crop_pct'] == 0.9
    assert tuple(cfg['std']) == own['std'] and cfg['interpolation'] == own['interpolation']
    args = options(folder_dataset, tmp_path, '--backbone-checkpoint', str(path), '--input-size', '64')
    assert create_network(args, 2) and args.input_size == [64]
    torch.save(dict(arch='resnet10t', state_dict=state, args=argparse.Namespace(input_size=None)), path)
    args = options(folder_dataset, tmp_path, '--backbone-checkpoint', str(path))
    assert create_network(args, 2) and args.input_size == list(own['input_size'])
    with pytest.raises(InputError, match='does not fit backbone=resnet18.* with 2 classes: name the network'):
        create_network(options(folder_dataset, tmp_path, '--backbone-checkpoint', str(path),
                               kwargs=['backbone=resnet18', 'at=2']), 2)


def test_heads_refuse_a_backbone_that_does_not_know_the_classes(folder_dataset, tmp_path):
    with pytest.raises(InputError, match='does not know the 2 classes: use --regime mixed'):
        Trainer(options(folder_dataset, tmp_path, '--regime', 'heads'))


@pytest.mark.parametrize('regime', ['heads', 'mixed'])
def test_a_last_exit_of_other_classes_is_refused(folder_dataset, tmp_path, regime):
    path = tmp_path / 'of_five.safetensors'
    save_file(timm.create_model('multiexit', backbone='resnet10t', at=2, num_classes=5).state_dict(), path)
    with pytest.raises(InputError, match='does not fit multiexit with 2 classes, as --regime .* use --regime joint'):
        create_network(options(folder_dataset, tmp_path, '--regime', regime, '--initial-checkpoint', str(path)), 2)


def test_heads_refuse_a_backbone_of_renamed_classes(folder_dataset, backbone, tmp_path):
    args = options(folder_dataset, tmp_path, '--regime', 'heads', kwargs=[f'backbone=local-dir:{backbone}', 'at=2'])
    assert create_network(args, 2, ('automobile', 'frog'))
    with pytest.raises(InputError, match='does not know the 2 classes'):
        create_network(args, 2, ('automobile', 'tree frog'))


def test_mixed_trains_the_backbone_first(folder_dataset, tmp_path):
    args = options(folder_dataset, tmp_path, '--regime', 'mixed')
    trainer = Trainer(args)
    assert args.backbone_epochs == 1
    net = trainer.task.get_trainable_module()

    def moved(epoch):
        before = {name: p.detach().clone() for name, p in net.named_parameters() if p.ndim == 4}
        trainer.train_epoch(epoch)
        return {name.split('.')[0] for name, p in net.named_parameters() if p.ndim == 4
                and (p - before[name]).norm() > 0.01 * before[name].norm()}
    assert moved(0) == {'backbone'}
    assert moved(1) == {'backbone', 'exits'}


def test_mixed_starts_at_the_second_phase_of_a_trained_backbone(folder_dataset, backbone, tmp_path):
    args = options(folder_dataset, tmp_path, '--regime', 'mixed', kwargs=[f'backbone=local-dir:{backbone}', 'at=2'])
    Trainer(args)
    assert args.backbone_epochs == 0


@pytest.mark.parametrize('extra', [['--regime', 'heads'], ['--backbone-checkpoint', 'file']])
def test_regimes_are_for_backbones(folder_dataset, tmp_path, extra):
    args = options(folder_dataset, tmp_path, *extra, '--model', 'vgg8_mc_cifar', kwargs=[])
    with pytest.raises(InputError, match=f'{" ".join(extra[:1])}.* is for exits on a backbone, not for vgg8_mc_cifar'):
        Trainer(args)
