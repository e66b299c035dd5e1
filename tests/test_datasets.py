"""The in-memory loader: splits, crops, flips, epochs, processes."""
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.data import create_transform

from timm_multiexit.data.splits import SPLITS, open_dataset, open_splits
from timm_multiexit.datasets import DATASETS, normalize, split_indices
from timm_multiexit.errors import InputError
from timm_multiexit.training.loader import InMemoryLoader

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def loader(n=64, **kwargs):
    images = torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    kwargs = {**dict(batch_size=16, mean=MEAN, std=STD, train=True, crop_padding=2), **kwargs}
    return InMemoryLoader(images, torch.arange(n), **kwargs), images


def test_split_is_fixed_and_disjoint():
    train, held_out = split_indices(50_000)
    assert len(train) == 45_000 and len(held_out) == 5_000
    assert len(torch.cat([train, held_out]).unique()) == 50_000
    assert held_out[:5].tolist() == split_indices(50_000)[1][:5].tolist()
    with pytest.raises(InputError):
        split_indices(100, 100)


def test_validation_images_get_the_test_transform(cifar_root):
    """No augmentation: the network's input equals that of timm's evaluation transform."""
    from torchvision.datasets import CIFAR10
    split = open_splits('torch/cifar10', cifar_root).development
    images, targets = split.pixels, split.targets
    dataset = CIFAR10(cifar_root, train=True)
    index = split_indices(50_000)[1]
    assert len(images) == 5000 and targets.tolist() == [dataset.targets[i] for i in index]
    batch, _ = next(iter(InMemoryLoader(images, targets, 8, MEAN, STD)))
    transform = create_transform((3, 32, 32), mean=MEAN, std=STD, crop_pct=1.0, interpolation='bilinear')
    expected = torch.stack([transform(dataset[i][0]) for i in index[:8].tolist()])
    torch.testing.assert_close(batch, expected)


@pytest.mark.parametrize('tag', DATASETS)
def test_records_describe_the_training_images(cifar_root, tag):
    record = DATASETS[tag]
    dataset = open_dataset(record.name, cifar_root, train=True)
    assert record.classes == tuple(dataset.classes) and len(record.classes) == max(dataset.targets) + 1
    assert dataset.data.shape[1:] == (*record.input_size[1:], record.input_size[0])
    values = np.arange(256) / 255
    for channel, mean, std in zip(np.moveaxis(dataset.data, 3, 0), record.mean, record.std):
        frequencies = np.bincount(channel.ravel(), minlength=256) / channel.size
        assert mean == pytest.approx(measured := frequencies @ values, abs=1e-4)
        assert std == pytest.approx(math.sqrt(frequencies @ (values - measured) ** 2), abs=1e-4)


def test_splits_of_cifar(cifar_root):
    splits = open_splits('torch/cifar100', cifar_root, certification=2_000)
    assert [len(splits[name]) for name in SPLITS] == [43_000, 5_000, 2_000, 10_000]
    alone = open_splits('torch/cifar100', cifar_root)
    assert splits.development.sources.index == alone.development.sources.index == split_indices(50_000)[1].tolist()
    used = [i for name in SPLITS[:3] for i in splits[name].sources.index]
    assert len(set(used)) == len(used) == 50_000
    with pytest.raises(InputError, match='unknown split'):
        splits['dev']
    with pytest.raises(InputError, match='no certification images: hold them out'):
        alone['certification']
    with pytest.raises(InputError, match='--dataset-download'):
        open_splits('torch/cifar10', cifar_root + '/nothing')


def test_crops_are_windows_of_the_reflected_image():
    batches, images = loader(hflip='none')
    padded = F.pad(images, (2, 2, 2, 2), mode='reflect')
    windows = padded.unfold(2, 8, 1).unfold(3, 8, 1)
    offsets = set()
    for x, targets in batches:
        for one, i in zip(x, targets.tolist()):
            found = [(dy, dx) for dy in range(5) for dx in range(5)
                     if torch.equal(one, normalize(windows[i:i + 1, :, dy, dx], MEAN, STD)[0])]
            assert found
            offsets.add(found[0])
    assert len(offsets) > 10


def test_alternating_flip_turns_every_image_each_epoch():
    batches, images = loader(hflip='alternate', crop_padding=0)
    flipped = []
    for epoch in range(3):
        batches.set_epoch(epoch)
        state = {}
        for x, targets in batches:
            for one, i in zip(x, targets.tolist()):
                plain = normalize(images[i:i + 1], MEAN, STD)[0]
                assert torch.equal(one, plain) or torch.equal(one, plain.flip(-1))
                state[i] = not torch.equal(one, plain)
        assert len(state) == 64
        flipped.append(state)
    assert all(flipped[0][i] != flipped[1][i] == (not flipped[2][i]) for i in range(64))
    assert 15 < sum(flipped[0].values()) < 49


def test_an_epoch_depends_only_on_seed_and_number():
    first, again, other = (loader(seed=s)[0] for s in (1, 1, 2))
    for batches in (first, again, other):
        batches.set_epoch(3)
    next(iter(first))  # draws of an earlier epoch change nothing
    a, b, c = (next(iter(batches)) for batches in (first, again, other))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and not torch.equal(a[1], c[1])
    again.set_epoch(4)
    assert not torch.equal(next(iter(again))[1], a[1])


def test_processes_share_one_order():
    whole, _ = loader(batch_size=16)
    parts = [loader(batch_size=8, rank=r, world_size=2)[0] for r in range(2)]
    for one, (a, b) in zip(whole, zip(*parts)):
        assert torch.equal(one[1], torch.cat([a[1], b[1]])) and torch.equal(one[0], torch.cat([a[0], b[0]]))


def test_evaluation_covers_each_image_once_over_processes():
    parts = [loader(n=50, train=False, rank=r, world_size=3)[0] for r in range(3)]
    seen = [t for part in parts for _, targets in part for t in targets.tolist()]
    assert sorted(seen) == list(range(50))


def test_random_erasing_blanks_regions():
    batches, _ = loader(hflip='none', reprob=1.)
    assert all((x == 0).all(1).flatten(1).any(1).all() for x, _ in batches)


def test_a_policy_changes_images_one_by_one_and_repeats_with_the_same_seeds():
    """timm's policy changes some images of a batch and keeps their order."""
    name = 'rand-m9-n1-p0.5'
    plain = loader(hflip='none')[0]
    batches = loader(hflip='none', aa=name)[0]

    def first(seed):
        random.seed(seed)
        np.random.seed(seed)
        return next(iter(batches))

    (x, targets), (again, _), (other, _) = first(1), first(1), first(2)
    unchanged = (x == next(iter(plain))[0]).flatten(1).all(1)
    assert torch.equal(targets, next(iter(plain))[1])
    assert 0 < unchanged.sum() < len(x)
    assert torch.equal(x, again) and not torch.equal(x, other)
    assert x.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(InputError, match="unknown augmentation 'randaugment'.*rand-m7"):
        loader(aa='randaugment')
    with pytest.raises(InputError, match="unknown augmentation 'cifar'"):
        loader(aa='cifar')


def test_batches_are_channels_last_floats():
    x, _ = next(iter(loader()[0]))
    assert x.dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last)
