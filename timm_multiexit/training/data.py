"""The images of a run: their splits, and how the network is to see them, recorded with it."""
import argparse
import logging
from typing import Any, Dict, List, Sequence, Tuple

from ..data.images import Images, image_sizes, value_range
from ..data.splits import Split, Splits, open_splits
from ..datasets import find_dataset
from ..errors import InputError
from ..inference.preprocess import Preprocessing
from ..models import MultiExitNet
from ..pretrained.record import TrainingData, describe
from .regimes import starts_trained

_logger = logging.getLogger('train')
# Enough for mean and deviation to two digits.
STATISTICS_IMAGES = 2000
STATISTICS_BATCH = 16
LARGEST_SIZE = 256  # pixels of images that are trained on as they are


def open_data(args: argparse.Namespace) -> Splits:
    """The splits of the data set that the options name.

    Raises:
        InputError: as `open_splits`, no training images, a single class, or another number of `--num-classes`.
    """
    splits = open_splits(
        args.dataset, args.data_dir, None, args.validation_images, args.certification_images,
        download=args.dataset_download)
    if args.rank == 0:
        for note in splits.notes:
            _logger.warning(note)
        _logger.info(f"{len(splits['train'])} images of {count_classes(splits)} classes to train on; for choices "
                     f'{splits.development.title}, for a guarantee {splits.certification.title}, to measure on '
                     f'{splits.test.title}')
    classes = count_classes(splits)
    if classes < 2:
        raise InputError(f"'{args.data_dir}' holds images of one class: give the folder that contains train/, or "
                         'the class folders')
    if args.num_classes not in (None, classes) and (splits.classes or args.num_classes < classes):
        raise InputError(f'--num-classes {args.num_classes}: the data set has {classes}: omit it')
    return splits


def count_classes(splits: Splits) -> int:
    """Number of classes of the training images."""
    return len(splits.classes) if splits.classes else int(splits.train.targets.max()) + 1


def describe_data(args: argparse.Namespace, model: MultiExitNet, splits: Splits) -> None:
    """Records in the network's pretrained cfg what it is trained on, and how it sees it.

    Raises:
        InputError: images of different sizes or large ones without `--input-size`, or too small ones.
    """
    cfg = model.pretrained_cfg
    transferred = starts_trained(args) or bool(args.initial_checkpoint or args.backbone_checkpoint)
    sizes, deep = image_sizes(splits.train)
    height, width = _input_size(args, cfg, sizes)
    least = min((cfg.get('min_input_size') or (3, 1, 1))[1:])
    if min(height, width) < least:
        raise InputError(f'images of {height} x {width} pixels: {args.model} needs {least} or more, pass --input-size')
    if cfg.get('fixed_input_size') and (height, width) != tuple(cfg['input_size'][1:]):
        raise InputError(f"the network takes {' x '.join(map(str, cfg['input_size'][1:]))} pixels only: pass "
                         f"--input-size {cfg['input_size'][1]}, or --model-kwargs img_size={height}")
    limits = value_range(splits.train) if deep else None
    known = find_dataset(args.dataset)
    source = cfg if transferred or not known else vars(known)
    mean, std = source['mean'], source['std']
    if model.in_chans == 1 and len(mean) == 3:
        mean, std = (sum(mean) / 3,), (sum(std) / 3,)
    config: Dict[str, Any] = dict(input_size=(model.in_chans, height, width), mean=tuple(mean), std=tuple(std))
    if not transferred and not known:
        config['mean'], config['std'] = _statistics(
            splits.train, Preprocessing({**_transform(cfg), **config}, limits))
    if splits.train.pixels is not None and tuple(splits.train.pixels.shape[1:]) == config['input_size']:
        config['crop_pct'] = 1.  # decoded images of this size are not cropped, see `Images`
    names = splits.classes if splits.classes and len(splits.classes) == model.num_classes else None
    describe(model, TrainingData(args.dataset, limits, splits.held_out), names, **config)
    if args.rank == 0 and (limits or (height, width) not in sizes or len(sizes) > 1):
        values = f'; raw values from {limits[0]:g} to {limits[1]:g} become 0 to 255' if limits else ''
        _logger.info(f'The network sees {height} x {width} pixels{values}')


def _transform(cfg: Dict[str, Any]) -> Dict[str, Any]:
    return {name: cfg[name] for name in ('interpolation', 'crop_pct', 'crop_mode') if cfg.get(name)}


def _input_size(args: argparse.Namespace, cfg: Dict[str, Any], sizes: Sequence[Tuple[int, int]]) -> Tuple[int, int]:
    given: List[int] = args.input_size or []
    if given:
        return (given[0], given[0]) if len(given) == 1 else (given[-2], given[-1])
    if starts_trained(args):
        return tuple(cfg['input_size'][1:])
    if len(sizes) == 1 and max(sizes[0]) <= LARGEST_SIZE:
        return sizes[0]
    if not sizes:
        raise InputError(f"no image in '{args.data_dir}' can be read")
    sides = [min(size) for size in sizes]
    usual = max(side for side in (32, 64, 96, 128, 160, 224) if side <= max(min(sides), 32))
    have = (f'have {len(sizes)} sizes, with a shorter side of {min(sides)} to {max(sides)} pixels'
            if len(sizes) > 1 else f'are large, {sizes[0][0]} x {sizes[0][1]} pixels')
    raise InputError(f"the images {have}: choose the network's input size, like --input-size {usual}")


def _statistics(split: Split, preprocess: Preprocessing) -> Tuple[Tuple[float, ...], Tuple[float, ...]]:
    """Mean and deviation of each channel over training images, in 0-1, rounded to four digits."""
    count, total, squares = 0, 0., 0.
    for images, _ in Images(split.some(STATISTICS_IMAGES), preprocess, STATISTICS_BATCH):
        x = images.double().div(255.).transpose(0, 1).flatten(1)
        count, total, squares = count + x.shape[1], total + x.sum(1), squares + x.square().sum(1)
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=1e-6).sqrt()
    return tuple(round(m, 4) for m in mean.tolist()), tuple(max(round(s, 4), 1e-3) for s in std.tolist())
