"""Data sets: one record for each that the package knows, their fixed splits, and normalisation.

Adding a data set is one entry of `DATASETS`: every network then has a tag for it, and the commands, the app and the
model cards read its names and statistics.
"""
from dataclasses import dataclass
from typing import Dict, Optional, Sequence, Tuple, Union

import torch

from .errors import InputError

VALIDATION_IMAGES = 5000  # held out of the training images by default
SPLIT_SEED = 0
Numbers = Union[Sequence[float], torch.Tensor]


@dataclass(frozen=True)
class Dataset:
    """What the package knows of a data set.

    Attributes:
        name: timm's name of it.
        title: Its name in text.
        hub_id: Its id on the Hugging Face Hub.
        classes: Class names in the order of the targets.
        mean: Mean of each channel over the training images, in 0-1.
        std: Standard deviation of each channel, in 0-1.
        input_size: (C, H, W).
    """
    name: str
    title: str
    hub_id: str
    classes: Tuple[str, ...]
    mean: Tuple[float, ...]
    std: Tuple[float, ...]
    input_size: Tuple[int, int, int] = (3, 32, 32)


# By the tag of weights trained on them. A network's name without a tag means the first one.
DATASETS: Dict[str, Dataset] = dict(
    cifar10=Dataset(
        name='torch/cifar10',
        title='CIFAR-10',
        hub_id='uoft-cs/cifar10',
        classes=tuple('airplane automobile bird cat deer dog frog horse ship truck'.split()),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    ),
    cifar100=Dataset(
        name='torch/cifar100',
        title='CIFAR-100',
        hub_id='uoft-cs/cifar100',
        classes=tuple("""
            apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
            castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
            elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard
            lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear
            pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark
            shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone
            television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
        """.split()),
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
    ),
)


def find_dataset(name: str) -> Optional[Dataset]:
    """The record of a data set by timm's name, None if there is none."""
    return next((dataset for dataset in DATASETS.values() if dataset.name == name), None)


def split_indices(num_images: int, validation_images: int = VALIDATION_IMAGES) -> Tuple[torch.Tensor, torch.Tensor]:
    """Indices of the training and of the validation images, the same on every machine.

    Args:
        num_images: Images in the training set.
        validation_images: How many of them to hold out.

    Returns:
        Two sorted int64 tensors without a common element, together all images.

    Raises:
        InputError: no training images would be left.
    """
    if not 0 <= validation_images < num_images:
        raise InputError(f'cannot hold out {validation_images} of {num_images} training images: hold out fewer')
    order = torch.randperm(num_images, generator=torch.Generator().manual_seed(SPLIT_SEED))
    return order[validation_images:].sort().values, order[:validation_images].sort().values


def normalize(images: torch.Tensor, mean: Numbers, std: Numbers) -> torch.Tensor:
    """Subtracts each channel's mean and divides by its standard deviation.

    Args:
        images: uint8 (B, C, H, W), 0-255.
        mean: Per channel, in 0-1.
        std: Per channel, in 0-1.

    Returns:
        float32 (B, C, H, W), channels last.
    """
    mean = torch.as_tensor(mean, device=images.device).mul(255.).view(1, -1, 1, 1)
    scale = torch.as_tensor(std, device=images.device).mul(255.).reciprocal_().view(1, -1, 1, 1)
    return images.contiguous(memory_format=torch.channels_last).float().sub_(mean).mul_(scale)
