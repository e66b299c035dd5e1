"""The app on a network of one's own: its names, its images, and the answers of `classify`."""
import dataclasses
import json

import pytest
import timm
import torch
from conftest import SMALL, calibrated_network
from photos import TWELVE, make_photos, save_12_bits, save_rgb
from safetensors.torch import save_file

from timm_multiexit.cli import main
from timm_multiexit.data.splits import open_splits
from timm_multiexit.errors import InputError
from timm_multiexit.files import write_json
from timm_multiexit.inference.preprocess import Preprocessing
from timm_multiexit.pretrained.load import load_model
from timm_multiexit.pretrained.record import TrainingData, config_of, describe
from timm_multiexit.stopping.config import FILE_NAME

pytest.importorskip('gradio', reason="the app needs gradio: pip install 'timm-multiexit[app]'")

import choose_examples  # noqa: E402
import handlers  # noqa: E402
import served  # noqa: E402

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.mark.parametrize('channels, save, suffix', [(3, save_rgb, '.jpg'), (1, save_12_bits, '.png')])
def test_own_images_and_names(tmp_path, monkeypatch, capsys, channels, save, suffix):
    monkeypatch.setattr(served, '_served', [])
    photos = make_photos(tmp_path / 'photos', TWELVE[:3], {'train': 30, 'test': 1}, (50, 70), save, suffix)
    splits = open_splits('folder', photos)
    torch.manual_seed(0)
    model = timm.create_model('msfuse_cifar', num_classes=3, in_chans=channels, **SMALL)
    limits = (0., 4095.) if channels == 1 else None
    describe(model, TrainingData('folder', limits, splits.held_out), splits.classes, crop_pct=0.875,
             input_size=(channels, 40, 40), mean=(.5,) * channels, std=(.25,) * channels)
    folder = tmp_path / 'final'
    write_json(folder / 'config.json', config_of(model))
    save_file(model.state_dict(), folder / 'model.safetensors')
    name = f'local-dir:{folder}'
    assert served.available_networks(name)[0] == name
    assert handlers.run_example(name, 0).true_class is None  # the package's, until some are chosen
    handlers.stored_for.cache_clear()
    served._loaded.clear()

    assert main(['calibrate', '--checkpoint', str(folder), '--data-dir', str(photos)]) == 0
    assert choose_examples.main([name, '--data-dir', str(photos)]) == 0
    assert served.available_networks(name)[0] == name
    network, assets, curve = handlers.stored_for(name)
    assert network.labels == splits.classes and assets.split == 'validation' and assets.examples and assets.gallery
    assert 'validation images' in curve.images
    preprocess, model = Preprocessing.of(load_model(name)), load_model(name)
    for number, example in enumerate(assets.examples):
        outputs = handlers.run_example(name, number)
        x, _ = preprocess(splits.development.sources[example.index])
        assert example.true_class == splits.classes[splits.development.targets[example.index]]
        expected = torch.cat(model.forward_exits(x[None]))
        assert torch.allclose(outputs.logits, expected, atol=1e-4)  # not resized and cropped once more
    page = handlers.open_network(name)
    assert page[0] == name and any('9 validation images, by the exit' in str(part) for part in page)

    # A photo of the test folder: what `classify` answers.
    photo = next(photos.glob(f'test/*/*{suffix}'))
    capsys.readouterr()
    assert main(['classify', str(photo), '--checkpoint', str(folder), '--json']) == 0
    (answer,) = json.loads(capsys.readouterr().out)
    outputs = handlers.run_file(name, str(photo))
    label, probability = answer['exits'][-1]['top'][0]
    assert outputs.labels[outputs.logits[-1].argmax()] == label
    assert float(outputs.probabilities()[-1].max()) == pytest.approx(probability, abs=1e-5)


def test_a_config_of_other_weights_is_not_taken_for_none(tmp_path):
    model, config = calibrated_network()
    describe(model, TrainingData('folder'), config.class_names)
    write_json(tmp_path / 'config.json', config_of(model))
    save_file(model.state_dict(), tmp_path / 'model.safetensors')
    assert served.Network(f'local-dir:{tmp_path}').config is None
    dataclasses.replace(config, weights='others').save(tmp_path / FILE_NAME)
    with pytest.raises(InputError, match='of other weights than these'):
        served.Network(f'local-dir:{tmp_path}')
