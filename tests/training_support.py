"""For tests of training: a small data set of real images, and train_timm.py in processes with torch already loaded."""
import os
import runpy
import sys
from pathlib import Path
from typing import List, Tuple

import pytest
from conftest import PROCESSES, PROJECT

SCRIPT = str(PROJECT / 'train_timm.py')


def run_training(arguments: List[str], log: Path) -> Tuple[int, str]:
    """Runs train_timm.py in a process of its own; returns its status, and what it printed."""
    process = PROCESSES.Process(target=_train, args=(arguments, log))
    process.start()
    process.join()
    return process.exitcode, log.read_text()


def _train(arguments: List[str], log: Path) -> None:
    with log.open('w') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [SCRIPT, *arguments]
    runpy.run_path(SCRIPT, run_name='__main__')


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
