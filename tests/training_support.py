"""The small data set of real images for tests of training."""
from pathlib import Path

import pytest


@pytest.fixture(scope='session')
def folder_dataset(tmp_path_factory, cifar_root) -> Path:
    """Real CIFAR images as a folder data set: two distinct classes, 440 training and 100 test images."""
    from torchvision.datasets import CIFAR10
    root = tmp_path_factory.mktemp('images')
    for split, train, per_class in (('train', True, 220), ('validation', False, 50)):
        dataset = CIFAR10(cifar_root, train=train)
        for target in (1, 6):
            folder = root / split / dataset.classes[target]
            folder.mkdir(parents=True)
            chosen = [i for i, t in enumerate(dataset.targets) if t == target][:per_class]
            for i in chosen:
                dataset[i][0].save(folder / f'{i:05d}.png')
    return root
