"""How a run sees one's own images: size, channels, statistics, and files that are streamed."""
import logging

import numpy as np
import pytest
import timm
import torch
from conftest import SMALL
from photos import make_photos, save_12_bits
from PIL import Image
from safetensors.torch import save_file

from timm_multiexit.data.images import Images
from timm_multiexit.datasets import DATASETS
from timm_multiexit.errors import InputError
from timm_multiexit.files import write_json
from timm_multiexit.inference.preprocess import Preprocessing
from timm_multiexit.pretrained.load import load_teacher
from timm_multiexit.pretrained.names import may_be_classes
from timm_multiexit.pretrained.record import TrainingData, config_of, describe, training_data
from timm_multiexit.training.data import count_classes, describe_data, open_data
from timm_multiexit.training.loader import InMemoryLoader, StreamedEvaluation, StreamingLoader, create_loaders
from timm_multiexit.training.options import parse_train_args
from timm_multiexit.training.task import exit_accuracies
from timm_multiexit.training.trainer import create_network, seed_epoch

CLASSES = ('a b', 'ç')


def described(root, *extra, in_chans=3):
    """Options, splits and a small network with its record, for a folder."""
    args = parse_train_args('', [
        '--dataset', 'folder', '--data-dir', str(root), '--model', 'msfuse_cifar', '--batch-size', '8', '--hflip',
        'none', *extra])
    args.rank, args.world_size, args.distributed = 0, 1, False
    splits = open_data(args)
    model = timm.create_model('msfuse_cifar', num_classes=count_classes(splits), in_chans=in_chans, **SMALL)
    describe_data(args, model, splits)
    return args, splits, model


def test_size_and_statistics_of_the_images(tmp_path):
    _, splits, model = described(make_photos(tmp_path, CLASSES, {'train': 10, 'test': 2}, (40, 40)))
    cfg = model.pretrained_cfg
    assert cfg['input_size'] == (3, 40, 40) and cfg['label_names'] == CLASSES and cfg['tag'] == ''
    images, _ = Images(splits.train, Preprocessing.of(model)).stack()
    x = images.double() / 255
    assert cfg['mean'] == pytest.approx(x.mean((0, 2, 3)).tolist(), abs=1e-4)
    assert cfg['std'] == pytest.approx(x.std((0, 2, 3), unbiased=False).tolist(), abs=1e-4)
    assert training_data(model).held_out['development'] == 2


def test_the_record_of_a_known_data_set_has_no_crop(cifar_root):
    """Training does not crop its images, though the backbone's cfg has a crop_pct."""
    args = parse_train_args('', [
        '--dataset', 'torch/cifar10', '--data-dir', cifar_root, '--model', 'multiexit', '--model-kwargs',
        'backbone=mobilenetv4_conv_small_035', 'at=2'])
    args.rank, args.world_size, args.distributed = 0, 1, False
    splits = open_data(args)
    model = create_network(args, count_classes(splits))
    assert model.pretrained_cfg['crop_pct'] < 1.
    describe_data(args, model, splits)
    image = splits.test.pixels[0]
    seen = Preprocessing.of(model).pixels(Image.fromarray(image.permute(1, 2, 0).numpy()))
    assert torch.equal(seen, image)


def test_photos_of_different_sizes_need_a_size(tmp_path):
    root = make_photos(tmp_path, CLASSES, {'train': 10, 'test': 2}, (40, 60))
    with pytest.raises(InputError, match='the images have .* sizes.*like --input-size 32'):
        described(root)
    with pytest.raises(InputError, match='needs 32 or more'):
        described(root, '--input-size', '16')
    args, splits, model = described(root, '--input-size', '48')
    train, held_out = create_loaders(args, splits, Preprocessing.of(model), torch.device('cpu'))
    assert next(iter(train))[0].shape == (8, 3, 48, 48) and next(iter(held_out))[0].shape == (2, 3, 48, 48)



def test_large_photos_need_a_size_too(tmp_path):
    root = make_photos(tmp_path, CLASSES, {'train': 2, 'test': 1}, (260, 260))
    with pytest.raises(InputError, match='the images are large, 260 x 260 pixels: .* like --input-size 224'):
        described(root)


def test_the_number_of_classes_is_that_of_the_folders(tmp_path):
    root = make_photos(tmp_path / 'photos', CLASSES, {'train': 2, 'test': 1}, (40, 40))
    with pytest.raises(InputError, match='--num-classes 10: the data set has 2: omit it'):
        described(root, '--num-classes', '10')
    with pytest.raises(InputError, match='holds images of one class: give the folder that contains train/'):
        described(tmp_path)


def test_names_tell_whether_a_network_knows_the_classes():
    assert may_be_classes(None, CLASSES) and may_be_classes(CLASSES, None) and may_be_classes(list(CLASSES), CLASSES)
    assert may_be_classes(('tench', 'goldfish'), ('n01440764', 'n01443537'))
    assert not may_be_classes(CLASSES, ('a b', 'c')) and not may_be_classes(CLASSES, CLASSES[::-1])


def test_a_teacher_of_other_classes_is_refused_and_a_grey_one_normalised(tmp_path):
    names = DATASETS['cifar10'].classes
    assert load_teacher('msfuse_cifar_budgeted.cifar10', '', 10, {}, (3, 32, 32), names)
    with pytest.raises(InputError, match='knows other classes, or these in another order: choose one for truck, ship'):
        load_teacher('msfuse_cifar_budgeted.cifar10', '', 10, {}, (3, 32, 32), names[::-1])
    save_file(timm.create_model('resnet10t', in_chans=1, num_classes=2).state_dict(), tmp_path / 'grey.safetensors')
    teacher = load_teacher('resnet10t', str(tmp_path / 'grey.safetensors'), 2, dict(in_chans=1), (1, 32, 32))
    assert teacher.pretrained_cfg['mean'] == pytest.approx(((0.485 + 0.456 + 0.406) / 3,))


def test_weights_of_other_classes_start_a_run(tmp_path, caplog):
    """All but the classifiers is loaded, and the images are normalised as for the run before."""
    torch.manual_seed(0)
    before = timm.create_model('msfuse_cifar', num_classes=5, **SMALL)
    describe(before, TrainingData('folder'), None, mean=(.1, .2, .3), std=(.4, .5, .6))
    final = tmp_path / 'final'
    save_file(before.state_dict(), written(final / 'model.safetensors'))
    write_json(final / 'config.json', config_of(before))
    root = make_photos(tmp_path / 'photos', CLASSES, {'train': 10, 'test': 2}, (40, 40))
    sizes = [f'{k}={v!r}'.replace(' ', '') for k, v in SMALL.items()]
    args, splits, _ = described(root, '--initial-checkpoint', str(final), '--model-kwargs', *sizes)
    with caplog.at_level(logging.WARNING):
        model = create_network(args, 2)
    assert [r.message for r in caplog.records] == [
        f"'{final / 'model.safetensors'}' knows 5 classes, not 2: all of it is used but the classifiers of its exits"]
    describe_data(args, model, splits)
    assert model.pretrained_cfg['mean'] == (.1, .2, .3) and model.pretrained_cfg['std'] == (.4, .5, .6)
    new = [k for k, v in model.state_dict().items() if not torch.equal(v, before.state_dict()[k])]
    assert new == [f'exits.{k}.fc.{name}' for k in range(3) for name in ('weight', 'bias')]
    with pytest.raises(InputError, match='does not fit'):
        create_network(parse_train_args('', ['--model', 'msfuse_cifar', '--initial-checkpoint', str(final)]), 2)


def written(path):
    path.parent.mkdir()
    return path


def test_grey_scans_of_12_bits(tmp_path):
    root = make_photos(tmp_path, CLASSES, {'train': 10, 'test': 2}, (40, 40), save_12_bits)
    args, splits, model = described(root, '--in-chans', '1', '--aa', 'rand-m9-n2', in_chans=1)
    low, high = training_data(model).value_range
    assert 0 <= low < high <= 4095 and model.pretrained_cfg['input_size'] == (1, 40, 40)
    for loader in ('memory', 'timm'):
        args.loader, args.workers = loader, 0
        x, _ = next(iter(create_loaders(args, splits, Preprocessing.of(model), torch.device('cpu'))[0]))
        assert x.shape == (8, 1, 40, 40) and x.std() > 0.5


@pytest.mark.parametrize('workers', [0, 1, 2])
def test_a_streamed_epoch_depends_only_on_its_number(tmp_path, workers):
    """So that a run which is resumed sees the images that it would have seen."""
    root = make_photos(tmp_path, CLASSES, {'train': 20, 'test': 2}, (40, 40))
    args, splits, model = described(root, '--loader', 'timm', '--workers', str(workers), '--aa', 'rand-m5-n1')

    def epochs(numbers):
        loader = StreamingLoader(Images(splits.train, Preprocessing.of(model)), args, torch.device('cpu'))
        batches = []
        for number in numbers:
            seed_epoch(args.seed, number, 0)
            batches.append(list(loader))
        return batches[-1]

    whole, resumed, other = epochs([0, 1]), epochs([1]), epochs([2])
    assert len(whole) == len(resumed) == 4
    assert all(torch.equal(a, b) for one, two in zip(whole, resumed) for a, b in zip(one, two))
    assert not torch.equal(whole[0][0], other[0][0])


def test_streamed_files_keep_their_colours_and_bad_ones_are_named_once(tmp_path, caplog):
    root = make_photos(tmp_path, CLASSES, {'train': 20, 'test': 2}, (40, 40), lambda path, values: Image.fromarray(
        np.full((40, 40, 3), (200, 100, 50), np.uint8)).save(path))
    (root / 'train' / CLASSES[0] / 'bad.png').write_text('no image')
    args, splits, model = described(root, '--loader', 'timm', '--workers', '0', '--validation-images', '0')
    preprocess = Preprocessing.of(model)
    loader = StreamingLoader(Images(splits.train, preprocess), args, torch.device('cpu'))
    with caplog.at_level(logging.WARNING):
        batches = [batch for _ in range(3) for batch in loader]
    assert all((x == x[:1, :, :1, :1]).all() for x, _ in batches)  # no colour jitter
    assert [r.message.count('bad.png') for r in caplog.records if 'Left out' in r.message] == [1]
    parts = [StreamedEvaluation(Images(splits.test, preprocess), torch.device('cpu'), r, 3) for r in range(3)]
    streamed = torch.cat([y for part in parts for _, y in part])
    assert sorted(streamed.tolist()) == [0, 0, 1, 1]
    idle = StreamedEvaluation(Images(splits.test, preprocess), torch.device('cpu'), 5, 6)
    assert exit_accuracies(model, idle).isnan().all()  # of this process alone: others add theirs
    whole = InMemoryLoader(*Images(splits.test, preprocess).stack(), 8, preprocess.mean, preprocess.std)
    assert torch.equal(next(iter(parts[0]))[0], next(iter(whole))[0][::3])
