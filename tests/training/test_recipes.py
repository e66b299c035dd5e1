"""Every recipe trains: a few steps of the full-size networks, in the order that their headers give."""
import json
import subprocess
import sys

import pytest
import timm
import torch
import yaml
from conftest import PROJECT
from safetensors.torch import load_file

from timm_multiexit.models._pretrained import WEIGHTS_DIR
from timm_multiexit.training.history import History, portable
from timm_multiexit.training.options import parse_train_args

FOLDER = PROJECT / 'timm_multiexit' / 'recipes'
# Teachers first; the networks of comparison.yaml without a recipe of their own run from it.
RUNS = [(name, []) for name in (
    'vgg8_mc_cifar.cifar10', 'vgg8_mc_cifar.cifar100', 'msfuse_cifar.cifar10', 'msfuse_cifar.cifar100',
    'msfuse_cifar_budgeted.cifar10', 'msfuse_cifar_budgeted.cifar100')]
RUNS += [('comparison', ['--model', f'{name}.cifar10', '--dataset', 'torch/cifar10']) for name in (
    'msdnet_cifar', 'ranet_cifar', 'resnet62_mc_cifar', 'densenet52_mc_cifar')]
RUNS.append(('finetune', ['--dataset', 'torch/cifar10', '--experiment', 'finetune']))
TRAIN_ALL = """
import json, sys
from timm_multiexit.training.options import parse_train_args
from timm_multiexit.training.run import train
for argv in json.loads(sys.argv[1]):
    train(parse_train_args('', argv))
"""


@pytest.fixture(scope='module')
def runs(cifar_root, tmp_path_factory):
    """The folder in which all recipes have trained for one epoch of two steps, on real images."""
    from torchvision.datasets import CIFAR10, CIFAR100
    root = tmp_path_factory.mktemp('recipes')
    for name, dataset in (('cifar10', CIFAR10), ('cifar100', CIFAR100)):
        for split in ('train', 'validation'):
            source = dataset(cifar_root, train=split == 'train')
            for target, label in enumerate(source.classes):  # a network has one output per class
                (root / name / split / label).mkdir(parents=True)
                source[source.targets.index(target)][0].save(root / name / split / label / '0.png')
    commands = []
    for recipe, extra in RUNS:
        argv = ['--config', str(FOLDER / f'{recipe}.yaml'), *extra]
        classes = parse_train_args('', argv).dataset.rpartition('cifar')[2]
        held_out = int(classes) - 8
        commands.append([*argv, '--dataset', 'folder', '--data-dir', str(root / f'cifar{classes}'), '--epochs', '1',
                         '--warmup-epochs', '0', '--batch-size', '4', '--validation-images', str(held_out),
                         '--certification-images', '0', '--device', 'cpu', '--threads', '1'])
    done = subprocess.run([sys.executable, '-c', TRAIN_ALL, json.dumps(commands)], cwd=root, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    return root / 'output'


@pytest.mark.slow('33 s of CPU time for all: eleven networks of full size')
@pytest.mark.parametrize('recipe, extra', RUNS, ids=lambda value: value if isinstance(value, str) else ' '.join(value))
def test_it_trains(runs, recipe, extra):
    args = parse_train_args('', ['--config', str(FOLDER / f'{recipe}.yaml'), *extra])
    final = runs / args.experiment / 'final'
    (step,) = History.read(final).steps
    settings = yaml.safe_load((FOLDER / f'{recipe}.yaml').read_text())
    changed = {'dataset', 'epochs', 'warmup_epochs', 'batch_size', 'validation_images', 'certification_images',
               *(['model'] if '--model' in extra else [])}
    changed.add('amp')  # off on a CPU without bfloat16 instructions
    assert {k: step.options[k] for k in settings if k not in changed} == {
        k: v for k, v in portable(settings).items() if k not in changed}
    state = load_file(final / 'model.safetensors')
    initial = timm.create_model(args.model, num_classes=len(state['exits.0.fc.weight']), **args.model_kwargs)
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in initial.state_dict().items()}
    assert all(torch.isfinite(v).all() for v in state.values())


@pytest.mark.slow('33 s of CPU time with those above')
def test_finetuning_starts_from_the_included_weights(runs):
    args = parse_train_args('', ['--config', str(FOLDER / 'finetune.yaml')])
    tuned, included = (load_file(folder / 'model.safetensors') for folder in (
        runs / 'finetune' / 'final', WEIGHTS_DIR / args.model))
    for name, before in included.items():
        if name.startswith('stages') and before.ndim == 4:
            assert 0 < (tuned[name].float() - before.float()).norm() < 0.1 * before.float().norm(), name


def test_all_recipes_are_run():
    assert {recipe for recipe, _ in RUNS} == {path.stem for path in FOLDER.glob('*.yaml')}
    compared = {extra[1].partition('.')[0] for recipe, extra in RUNS if recipe == 'comparison'}
    for name in {path.name for path in WEIGHTS_DIR.iterdir()} - {recipe for recipe, _ in RUNS}:
        assert name.partition('.')[0].removesuffix('_budgeted') in compared


@pytest.mark.parametrize('recipe', sorted(FOLDER.glob('*.yaml')), ids=lambda path: path.stem)
def test_it_names_its_network_and_is_listed(recipe):
    args = parse_train_args('', ['--config', str(recipe)])
    assert f'recipes/{recipe.name}' in recipe.read_text()  # the command in its header
    assert f'`{recipe.stem.partition(".")[0]}' in (FOLDER / 'README.md').read_text()
    if args.dataset == 'folder':  # any
        return
    # The tag matters: it sets the mean and deviation that evaluation of these weights will use.
    assert args.model.endswith(f".{args.dataset.split('/')[1]}")
    assert timm.is_model(args.model)
    assert recipe.stem in (args.model, 'comparison') and args.experiment == args.model
