"""What a network was trained on travels with its weights, and is all that the commands need."""
import json
import shutil

import pytest
import timm
import torch
from conftest import SMALL
from PIL import Image
from safetensors.torch import save_file

from timm_multiexit import EarlyExitRunner, ExitPolicy, InputError, exit_costs, load_model
from timm_multiexit.cli import main
from timm_multiexit.files import write_json
from timm_multiexit.pretrained.names import class_labels
from timm_multiexit.pretrained.record import TrainingData, config_of, describe, find_weights, training_data

NAMES = ('Äpfel und Birnen', 'bag', 'chair', 'dog')
DATA = TrainingData('folder', (0., 4095.), {'development': 12})


def network(in_chans=3, size=48):
    """A small network with random weights, of four classes and 48x48 images."""
    torch.manual_seed(0)
    model = timm.create_model('msfuse_cifar', num_classes=4, in_chans=in_chans, **SMALL).eval()
    describe(model, DATA, NAMES, input_size=(in_chans, size, size), mean=(.5,) * in_chans, std=(.25,) * in_chans)
    return model


@pytest.fixture
def folder(tmp_path):
    model = network()
    path = tmp_path / 'final'
    path.mkdir()
    save_file(model.state_dict(), path / 'model.safetensors')
    write_json(path / 'config.json', config_of(model))
    return path


@pytest.fixture
def image(tmp_path):
    torch.manual_seed(1)
    path = tmp_path / 'images' / 'a.png'
    path.parent.mkdir()
    Image.fromarray(torch.randint(256, (48, 48, 3), dtype=torch.uint8).numpy()).save(path)
    return path


@pytest.mark.parametrize('file', ['', 'model.safetensors', 'copy.safetensors'])
def test_a_folder_or_a_file_in_it_is_enough(folder, file):
    shutil.copy(folder / 'model.safetensors', folder / 'copy.safetensors')
    model, expected = load_model(checkpoint=folder / file), network()
    x = torch.rand(2, 3, 48, 48)
    assert all(torch.equal(a, b) for a, b in zip(model.forward_exits(x), expected.forward_exits(x)))
    assert class_labels(model) == NAMES and training_data(model) == DATA
    config = timm.data.resolve_data_config(model=model)
    assert config['input_size'] == (3, 48, 48) and tuple(config['mean']) == (.5,) * 3
    assert exit_costs(model) == exit_costs(expected, (3, 48, 48))


def test_timm_loads_the_folder(folder):
    model = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert model.num_classes == 4 and tuple(model.pretrained_cfg['label_names']) == NAMES
    assert timm.data.resolve_model_data_config(model)['input_size'] == (3, 48, 48)


def test_commands_and_runner_agree_at_the_recorded_size(folder, image, capsys):
    assert main(['classify', str(image), '--checkpoint', str(folder), '--json']) == 0
    (answer,) = json.loads(capsys.readouterr().out)
    model = load_model(checkpoint=folder)
    costs = exit_costs(model, (3, 48, 48))
    assert answer['label'] in NAMES and [e['macs'] for e in answer['exits']] == list(costs.macs)
    _, run = EarlyExitRunner(model, ExitPolicy.at_exit(2, 3)).run_folder(image.parent)
    assert NAMES[run.prediction[0]] == answer['label'] and run.macs[0] == costs.macs[-1]
    assert main(['costs', '--checkpoint', str(folder), '--json']) == 0
    assert json.loads(capsys.readouterr().out) == dict(
        model='msfuse_cifar', num_classes=4, input_size=[3, 48, 48], macs=list(costs.macs), params=list(costs.params))


def test_one_channel(tmp_path):
    model = network(in_chans=1)
    config = config_of(model)
    assert config['pretrained_cfg']['input_size'] == [1, 48, 48] and config['model_args']['in_chans'] == 1
    save_file(model.state_dict(), tmp_path / 'model.safetensors')
    write_json(tmp_path / 'config.json', config)
    assert load_model(checkpoint=tmp_path)(torch.rand(1, 1, 48, 48)).shape == (1, 4)


def test_names_of_other_data_are_not_shown(tmp_path):
    """Ten classes of one's own are not CIFAR-10's."""
    path = tmp_path / 'model.safetensors'
    save_file(timm.create_model('msfuse_cifar').state_dict(), path)
    assert class_labels(load_model('msfuse_cifar', path))[0] == 'class 0'
    (tmp_path / 'recipe.yaml').write_text('model: msfuse_cifar.cifar10\ndataset: torch/cifar10\n')
    assert class_labels(load_model(checkpoint=path))[0] == 'airplane'


def test_what_cannot_be_loaded_is_refused(folder, tmp_path):
    for given, words in [
        (('', ''), 'which network'), (('', tmp_path / 'no'), 'is not a file or folder'),
        (('', tmp_path), 'holds no model.safetensors: give .*final'),
        (('resnet62_mc_cifar', folder), 'holds weights of msfuse_cifar, not of resnet62_mc_cifar'),
    ]:
        with pytest.raises(InputError, match=words):
            find_weights(*given)
    config = json.loads((folder / 'config.json').read_text())
    config['multiexit']['colour'] = 'red'
    write_json(folder / 'config.json', config)
    with pytest.raises(InputError, match='unknown fields .* colour: update'):
        load_model(checkpoint=folder)
    (folder / 'config.json').write_text('[]')
    with pytest.raises(InputError, match='config.json. must hold an object, not a list'):
        find_weights('', folder)
    (folder / 'config.json').unlink()
    (folder / 'recipe.yaml').write_text('- list')
    with pytest.raises(InputError, match='name the network that it was trained as'):
        load_model(checkpoint=folder)
    with pytest.raises(InputError, match="for 10 classes, not 5"):
        load_model('msfuse_cifar', num_classes=5)
