"""Images in memory: splits with a fixed generator, and a loader that augments whole batches where the data lies.

On two cores and on one fast GPU alike, decoding and augmenting image by image would be the bottleneck for 32x32 images.
Here the data set is one uint8 tensor on the training device and a batch is one gather.
"""
from pathlib import Path
from typing import Optional, Sequence, Tuple, Union

import numpy as np
import torch
from timm.data import create_dataset

from .errors import InputError

VALIDATION_IMAGES = 5000
SPLIT_SEED = 0
SPLITS = ('train', 'validation', 'train+validation', 'test')
Numbers = Union[Sequence[float], torch.Tensor]


def split_indices(num_images: int, validation_images: int = VALIDATION_IMAGES) -> Tuple[torch.Tensor, torch.Tensor]:
    """Indices of the training and of the validation images, the same on every machine.

    Args:
        num_images: Images in the training set.
        validation_images: How many of them to hold out.

    Returns:
        Two sorted int64 tensors, disjoint, together all images.

    Raises:
        InputError: nothing would be left to train on.
    """
    if not 0 <= validation_images < num_images:
        raise InputError(f'cannot hold out {validation_images} of {num_images} training images: hold out fewer')
    order = torch.randperm(num_images, generator=torch.Generator().manual_seed(SPLIT_SEED))
    return order[validation_images:].sort().values, order[:validation_images].sort().values


def open_dataset(name: str, root: str, train: bool, download: bool = False):
    """A data set by timm's name ('torch/cifar10', 'torch/cifar100', 'folder', ...).

    Raises:
        InputError: it is not there.
    """
    try:
        return create_dataset(name, root=root, split='train' if train else 'validation', download=download)
    except (RuntimeError, OSError, AssertionError, ValueError) as error:
        hint = 'pass --dataset-download to fetch it' if name.startswith('torch/') else 'check --data-dir and --dataset'
        raise InputError(f"data set '{name}' cannot be read from '{root}' ({error}): {hint}") from error


def load_images(
        name: str,
        root: str,
        split: str,
        download: bool = False,
        validation_images: int = VALIDATION_IMAGES,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """One split of a data set, whole.

    Args:
        name: timm's name of the data set.
        root: Its folder.
        split: 'train', 'validation' (held out of the training images), 'train+validation', or 'test'.
        download: Let torchvision fetch it.
        validation_images: How many training images to hold out.

    Returns:
        Images uint8 (N, C, H, W) and targets int64 (N,).

    Raises:
        InputError: unknown split, data set not there, or images of different sizes.
    """
    if split not in SPLITS:
        raise InputError(f"unknown split '{split}': choose one of {', '.join(SPLITS)}")
    dataset = open_dataset(name, root, train=split != 'test', download=download)
    images, targets = _stack(dataset)
    if split in ('train', 'validation'):
        index = split_indices(len(images), validation_images)[split == 'validation']
        images, targets = images[index], targets[index]
    return images, targets


def _stack(dataset) -> Tuple[torch.Tensor, torch.Tensor]:
    pixels = getattr(dataset, 'data', None)
    if isinstance(pixels, np.ndarray) and pixels.ndim == 4:  # torchvision's CIFAR, already decoded
        images, targets = torch.from_numpy(pixels), torch.as_tensor(dataset.targets)
    else:
        arrays, targets = [], []
        for image, target in dataset:
            arrays.append(np.asarray(image.convert('RGB')))
            targets.append(target)
        sizes = {a.shape for a in arrays}
        if len(sizes) != 1:
            raise InputError(
                f'the in-memory loader needs images of one size, this data set has {len(sizes)}: use --loader timm')
        images, targets = torch.from_numpy(np.stack(arrays)), torch.as_tensor(targets)
    return images.permute(0, 3, 1, 2).contiguous(), targets.long()


def normalize(images: torch.Tensor, mean: Numbers, std: Numbers) -> torch.Tensor:
    """uint8 (B, C, H, W) in 0-255 to float32, channels last, each channel less its mean and by its deviation."""
    mean = torch.as_tensor(mean, device=images.device).mul(255.).view(1, -1, 1, 1)
    scale = torch.as_tensor(std, device=images.device).mul(255.).reciprocal_().view(1, -1, 1, 1)
    return images.contiguous(memory_format=torch.channels_last).float().sub_(mean).mul_(scale)


def class_names(name: str, root: str) -> Optional[Tuple[str, ...]]:
    """Names of a data set's classes, if it has them and lies in `root`."""
    if not Path(root).is_dir():
        return None
    classes = getattr(open_dataset(name, root, train=False), 'classes', None)
    return tuple(classes) if classes else None
