"""The splits of a data set: images to train on, two sets that are held out, and those to measure on.

*development* is for choices: epochs, temperatures, thresholds. *certification* is for nothing but a guarantee, so it is
held out only where it is large enough for one. A folder of one's own may hold

    train/ and test/, or train/ and val/    held out of train/; the other folder is measured on
    train/, val/ and test/                  val/ is held out, test/ is measured on
    class folders only                      split three ways: 20 % to measure on, 10 % for development

Everything is fixed: by a hash of file names for folders, stratified, and by a seeded generator for timm's data sets.
"""
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset
from timm.utils.misc import natural_key

from ..datasets import VALIDATION_IMAGES, split_indices
from ..errors import InputError
from ..inference.images import image_files, image_paths
from ..stopping.scores import UNKNOWN
from .folders import ClassFolders, check_classes, find_splits, held_out_order, read_classes

DEVELOPMENT_SHARE, TEST_SHARE = 0.1, 0.2
# With fewer images no loss of one point can be ruled out with 90 % certainty, even if none is seen.
MIN_CERTIFICATION = 230
READERS = ('torch', 'hfds', 'hfids', 'tfds', 'wds')  # timm's, which `name/...` chooses
FOLDER_NAMES = ('folder', 'image_folder', 'imagefolder')


class _DatasetImages(Sequence):
    """Chosen images of a data set in torch's form, as PIL images."""

    def __init__(self, dataset: Any, index: Sequence[int]):
        self.dataset, self.index = dataset, index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i):
        return self.dataset[self.index[i]][0]

    def at(self, index: Sequence[int]) -> '_DatasetImages':
        return _DatasetImages(self.dataset, [self.index[i] for i in index])


@dataclass(frozen=True)
class Split:
    """Labelled images, none of them decoded yet.

    Attributes:
        title: In words, for reports.
        sources: What `images.read_image` takes: files, or PIL images that are made on access.
        targets: int64 (N,).
        pixels: The images, uint8 (N, C, H, W), of data sets that are decoded anyway; else None.
    """

    title: str
    sources: Sequence[Union[Path, Image.Image]]
    targets: torch.Tensor
    pixels: Optional[torch.Tensor] = None

    def __len__(self) -> int:
        return len(self.sources)

    def some(self, count: int) -> 'Split':
        """At most so many of the images, evenly spaced: files are in the order of their classes."""
        return self.at(torch.linspace(0, len(self) - 1, min(count, len(self))).long())

    def divided(self, count: int) -> Tuple['Split', 'Split']:
        """`some(count)`, and the images that are not among them."""
        others = torch.ones(len(self), dtype=torch.bool)
        others[torch.linspace(0, len(self) - 1, min(count, len(self))).long()] = False
        return self.some(count), self.at(others.nonzero().flatten())

    def at(self, index: torch.Tensor) -> 'Split':
        """The images with these numbers, int64 (n,); still none is decoded."""
        chosen, sources = index.tolist(), self.sources
        return Split(self.title, sources.at(chosen) if isinstance(sources, _DatasetImages) else
                     [sources[i] for i in chosen], self.targets[index],
                     None if self.pixels is None else self.pixels[index])


@dataclass(frozen=True)
class Splits:
    """The splits of a data set.

    Attributes:
        dataset: timm's name.
        classes: Names in the order of the targets; None if the data set has none.
        train, development, certification, test: The last is what is measured on. Any may be empty.
        held_out: For the record: which images were held out and how.
        notes: What is there and not used, in one line each.
    """

    dataset: str
    classes: Optional[Tuple[str, ...]]
    train: Split
    development: Split
    certification: Split
    test: Split
    held_out: Dict[str, Any] = field(default_factory=dict)
    notes: Tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Split:
        """A split by name.

        Raises:
            InputError: unknown, or without images.
        """
        if name not in SPLITS:
            raise InputError(f"unknown split '{name}': choose one of {', '.join(SPLITS)}")
        split: Split = getattr(self, name)
        if not len(split):
            raise InputError(f'there are no {name} images: {_HINTS[name]}')
        return split


SPLITS = ('train', 'development', 'certification', 'test')
_HINTS = dict(
    train='put them into train/CLASS/, or hold out fewer (--validation-images)', test='put them into test/CLASS/',
    development='all images were trained on, or there is no train/; pass --validation-images N to hold out N of them',
    certification='hold them out in training with --certification-images N')


def open_splits(
        dataset: str,
        root: Union[str, Path],
        classes: Optional[Sequence[str]] = None,
        development: Optional[int] = None,
        certification: Optional[int] = None,
        held_out: Optional[Dict[str, Any]] = None,
        download: bool = False,
) -> Splits:
    """Finds the images of each split; no image is read.

    Args:
        dataset: timm's name of the data set, 'folder' for a folder of class folders.
        root: Its folder.
        classes: Names that a network knows, in the order of its targets; None for those of the training images.
        development: Training images to hold out for choices; None for what `held_out` says, else a default.
        certification: Likewise, for the guarantee.
        held_out: `Splits.held_out` of the run that trained the network.
        download: Let torchvision download the data set.

    Raises:
        InputError: data that is not there, classes that the network does not know, or more images to hold out than
            there are.
    """
    given = (development, certification)
    if any(n is not None and n < 0 for n in given):
        raise InputError(f'held-out images {given}: give 0 or more')
    if dataset.lower() in FOLDER_NAMES:
        return _folder_splits(Path(root), classes, *given, held_out or {})
    return _dataset_splits(dataset, str(root), classes, *given, held_out or {}, download)


def _folder_splits(
        root: Path,
        classes: Optional[Sequence[str]],
        development: Optional[int],
        certification: Optional[int],
        before: Dict[str, Any],
) -> Splits:
    sets = find_splits(root)
    notes = [note for each in sets.values() for note in each.notes]
    single = sets.get('all') or (sets['train'] if set(sets) == {'train'} else None)
    train = single or sets.get('train')
    separate = 'validation' in sets and 'test' in sets
    pool = sets['validation'] if separate else train or ClassFolders('')
    tests = single or sets.get('test') or sets.get('validation') or ClassFolders('')
    if classes is None:
        classes = sorted((train or tests).files, key=lambda name: (natural_key(name), name))
    notes += check_classes(list(sets.values()), classes)
    # Else the record is of other folders. A set without splits is titled by its folder, which may have been renamed.
    same = before.get('from') == pool.title or (single is not None and before.get('images') == len(pool))
    recorded = before if same else {}

    order, images = held_out_order(pool), len(pool)
    measured = recorded.get('test', round(TEST_SHARE * images)) if single else 0
    if separate and development:
        raise InputError(f'--validation-images {development}: {pool.title} is held out already: omit it')
    certification = _number(certification, recorded.get('certification'), images // 2 if separate else
                            round(DEVELOPMENT_SHARE * images), MIN_CERTIFICATION)
    rest = images - measured - certification
    development = rest if separate else _number(
        development, recorded.get('development'), max(round(DEVELOPMENT_SHARE * images), min(1, images)))
    if rest < development or development < 0:
        raise InputError(f'cannot hold out {max(development, 0)} and {certification} of the {images - measured} images '
                         f'of {pool.title}: hold out fewer (--validation-images, --certification-images)')
    parts, start = [], 0
    for count in (measured, development, certification):
        parts.append(order[start:start + count])
        start += count
    digest = hashlib.sha256('\n'.join(f'{name}/{file.name}' for part in parts for name, file in part).encode(
        'utf-8', 'surrogateescape'))
    record = dict(zip(('from', 'images', 'development', 'certification', 'digest'), (
        pool.title, images, development, certification, digest.hexdigest()[:16])))
    if single:
        record['test'] = measured
    if same and before.get('digest') != record['digest']:
        notes.append(f'the images of {pool.title} that are held out are not those of the training run: files were '
                     'added or removed since, or other numbers are held out')

    def split(title: str, items: Sequence[Tuple[str, Path]]) -> Split:
        return Split(title, [file for _, file in items], torch.tensor(
            [classes.index(name) for name, _ in items], dtype=torch.int64))

    everything = [(name, file) for name in train.files for file in train.files[name]] if train else []
    remaining = everything if separate else order[start:]
    return Splits(
        'folder', tuple(classes), split(train.title if train else '', sorted(remaining, key=lambda item: item[1])),
        split(f'{development} images of {pool.title}', parts[1]),
        split(f'{certification} images of {pool.title}', parts[2]),
        split(f'{measured} images of {tests.title}', parts[0]) if single else split(
            tests.title, [(name, file) for name in tests.files for file in tests.files[name]]),
        record, tuple(notes))


def _number(given: Optional[int], recorded: Optional[int], default: int, least: int = 0) -> int:
    if given is not None:
        return given
    if recorded is not None:
        return recorded
    return default if default >= least else 0


def _dataset_splits(
        name: str,
        root: str,
        classes: Optional[Sequence[str]],
        development: Optional[int],
        certification: Optional[int],
        before: Dict[str, Any],
        download: bool,
) -> Splits:
    train, test = (open_dataset(name, root, split, download) for split in (True, False))
    development = _number(development, before.get('development'), min(VALIDATION_IMAGES, len(train) // 10))
    certification = _number(certification, before.get('certification'), 0)
    rest, held_out = split_indices(len(train), development + certification)
    # The development images are those that a run without certification images would hold out.
    first = split_indices(len(train), development)[1]
    others = held_out[~torch.isin(held_out, first)]
    names = [name if isinstance(name, str) else ', '.join(name) for name in _classes(train)]  # ImageNet's are tuples
    if _classes(test) != _classes(train) or (
            (files := getattr(train, 'samples', None)) and files == getattr(test, 'samples', None)):
        raise InputError(f"data set '{name}' has other classes in its test images than in its training images, or the "
                         f"same images: check '{root}', or use --dataset folder")
    lookup = None
    if names and classes and names != list(classes):  # equal, a name may occur twice
        check_classes([ClassFolders(f"data set '{name}'", {n: [] for n in names})], classes)
        lookup = torch.tensor([list(classes).index(n) for n in names])

    def split(title: str, dataset: Any, index: torch.Tensor, targets: torch.Tensor) -> Split:
        pixels = getattr(dataset, 'data', None)
        decoded = isinstance(pixels, np.ndarray) and pixels.ndim == 4  # torchvision's CIFAR
        return Split(title, _DatasetImages(dataset, index.tolist()), targets[index] if lookup is None else
                     lookup[targets[index]], torch.from_numpy(pixels[index]).permute(0, 3, 1, 2) if decoded else None)

    targets, test_targets = _targets(train), _targets(test)
    return Splits(
        name, tuple(classes or names or ()) or None, split('training images', train, rest, targets),
        split(f'{development} training images', train, first, targets),
        split(f'{certification} training images', train, others, targets),
        split('test images', test, torch.arange(len(test)), test_targets),
        {'from': 'training images', 'images': len(train), 'development': development, 'certification': certification})


def open_dataset(name: str, root: str, train: bool, download: bool = False) -> Any:
    """Opens timm's data set.

    Args:
        name: timm's name ('torch/cifar10', 'hfds/...').
        root: Its folder.
        train: The training images, else the test images.
        download: Let torchvision download it.

    Returns:
        A torch data set of (PIL image, target) pairs.

    Raises:
        InputError: it is not there, cannot be read, or only in order.
    """
    if name.partition('/')[0] not in READERS or '/' not in name:  # timm would read any folder, split or not
        raise InputError(f"unknown data set '{name}': give 'folder' for a folder of images, or timm's name, such as "
                         'torch/cifar10')
    split = 'train' if train else 'validation'
    try:
        try:
            dataset = create_dataset(name, root=root, split=split, download=download)
        except ValueError:
            if train or not name.startswith('hfds/'):
                raise
            dataset = create_dataset(name, root=root, split='test', download=download)  # many on the Hub have these two
    except (RuntimeError, OSError, AssertionError, ValueError, ImportError) as error:
        unknown = 'Unknown torchvision' in str(error)
        hint = ('put its images into train/CLASS/ and test/CLASS/, for --dataset folder' if unknown
                else 'pass --dataset-download to download it' if name.startswith('torch/') and not download
                else 'check --data-dir and --dataset')
        raise InputError(f"data set '{name}' cannot be read from '{root}' ({error}): {hint}") from error
    if isinstance(dataset, torch.utils.data.IterableDataset):
        raise InputError(f"data set '{name}' is read as a stream, from which no images can be held out: use a folder")
    return dataset


def _targets(dataset: Any) -> torch.Tensor:
    known: Optional[List[int]] = getattr(dataset, 'targets', None)
    if hasattr(getattr(dataset, 'reader', None), 'iter_targets'):  # without decoding the images
        known = list(dataset.reader.iter_targets())
    if known is None or torch.as_tensor(known).ndim != 1:  # QMNIST has several values for each
        known = [target for _, target in dataset]
    return torch.as_tensor(known).long()


def _classes(dataset: Any) -> List[Any]:
    reader = getattr(dataset, 'reader', None)  # timm's own
    return list(getattr(dataset, 'classes', None) or getattr(reader, 'class_to_idx', None) or ())


def certification_split(folder: str, names: Sequence[str]) -> Split:
    """Images for a guarantee alone, labelled by the class folders that they are in; those beside have no label.

    Raises:
        InputError: no images, or a folder that is not named after a class.
    """
    labelled = read_classes(Path(folder), f"'{folder}'")
    check_classes([labelled], names)
    label = {path: names.index(name) for name, files in labelled.files.items() for path in files}
    # Class folders may be links, which `image_files` does not follow; without any image `image_paths` tells why.
    paths = sorted({*image_files(Path(folder)), *label}) or image_paths(folder)
    return Split(f"'{folder}'", paths, torch.tensor([label.get(path, UNKNOWN) for path in paths]))
