"""Loaders of a run: batches augmented as tensors where the images are kept, or timm's pipeline of PIL images."""
import argparse
import logging
from typing import Any, Callable, Iterable, Iterator, List, Optional, Sequence, Set, Tuple, Union

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_loader
from timm.data.auto_augment import auto_augment_transform, rand_augment_transform
from timm.data.random_erasing import RandomErasing

from ..data.images import Images
from ..data.splits import Splits
from ..datasets import normalize
from ..errors import InputError
from ..inference.preprocess import Preprocessing

_logger = logging.getLogger('train')
# All images as uint8; beyond it they are streamed from their files.
MEMORY_LIMIT = 4 * 2 ** 30
EVALUATION_BATCH = 500  # of images of up to 96 x 96 pixels, fewer of larger ones


def augmentation_policy(name: str, image_size: Sequence[int], mean: Sequence[float]) -> Callable:
    """timm's RandAugment or AutoAugment for images of one size, named as timm's --aa takes it.

    Args:
        name: Policy, e.g. 'rand-m7-n2-mstd0.5-inc1' or 'original'.
        image_size: Height and width, pixels.
        mean: Per channel, in 0-1: the fill colour.

    Returns:
        A function of a PIL image that draws from Python's and NumPy's global generators.

    Raises:
        InputError: timm has no such policy.
    """
    # As timm.data.create_transform sets them.
    hparams = dict(translate_const=int(min(image_size) * 0.45), img_mean=tuple(min(255, round(255 * m)) for m in mean))
    try:
        return (rand_augment_transform if name.startswith('rand') else auto_augment_transform)(name, hparams)
    except (AssertionError, KeyError, ValueError) as error:
        raise InputError(f"unknown augmentation '{name}': choose a policy of timm's --aa, "
                         "such as rand-m7-n2-mstd0.5-inc1 or original") from error


def augment(images: torch.Tensor, policy: Callable) -> torch.Tensor:
    """Applies `policy` to each image of a batch, uint8 (B, 3 or 1, H, W); returns the same on the CPU."""
    arrays = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()  # the policies are for RGB
    changed = np.stack([np.asarray(policy(Image.fromarray(array))) for array in arrays])
    return torch.from_numpy(changed).permute(0, 3, 1, 2)[:, :images.shape[1]]


class InMemoryLoader:
    """Batches of augmented images, made with tensor operations on the device that holds the images.

    Decoding and augmenting 32x32 images one by one would be the bottleneck on two cores and on one fast GPU alike.

    An epoch's order and augmentation depend on (seed, epoch) alone, so a resumed run sees the images that the
    uninterrupted one would have seen. Several processes share each global batch: process r of w takes the r-th of its
    w slices, and all get the same number of batches.

    Args:
        images: uint8 (N, C, H, W).
        targets: int64 (N,).
        batch_size: Images per batch and process.
        mean, std: Per channel, in 0-1.
        train: Shuffle, augment, and drop the last incomplete batch.
        crop_padding: Pixels of reflected border around the random crop.
        hflip: 'random', 'alternate' (each image flips every other epoch, half of them in even epochs), or 'none'.
        aa: timm's RandAugment or AutoAugment policy ('rand-m7-n2-mstd0.5-inc1', 'original', ...), applied image by
            image on the CPU after crop and flip; None for none.
        reprob: Probability of random erasing (timm's RandomErasing, mode 'const').
        recount: Regions to erase.
        seed: Seed of everything random here.
        device: Where images are kept and batches are made.
        rank, world_size: This process and the number of processes.

    Raises:
        InputError: an unknown flip or policy, or fewer training images than one batch.
    """

    def __init__(
            self,
            images: torch.Tensor,
            targets: torch.Tensor,
            batch_size: int,
            mean: Sequence[float],
            std: Sequence[float],
            train: bool = False,
            crop_padding: int = 4,
            hflip: str = 'alternate',
            aa: Optional[str] = None,
            reprob: float = 0.,
            recount: int = 1,
            seed: int = 0,
            device: Union[str, torch.device] = 'cpu',
            rank: int = 0,
            world_size: int = 1,
    ):
        if hflip not in ('random', 'alternate', 'none'):
            raise InputError(f"unknown flip '{hflip}': choose random, alternate or none")
        self.num_images = len(images)
        self.batch_size = batch_size
        # On the device once: a copy per batch would wait for the step before.
        self.mean, self.std = (torch.tensor(values, device=device) for values in (mean, std))
        self.train = train
        self.hflip = hflip
        self.seed = seed
        self.device = device = torch.device(device)
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        if train and len(self) == 0:
            raise InputError(
                f'{self.num_images} training images do not fill one batch of {batch_size} x {world_size} processes: '
                'use a smaller --batch-size')
        self.targets = targets.to(device)
        self.erasing = self.policy = None
        if train:
            if aa:
                self.policy = augmentation_policy(aa, images.shape[-2:], mean)
            if reprob > 0.:
                self.erasing = RandomErasing(probability=reprob, max_count=recount, mode='const', device=device)
            height, width = images.shape[-2:]
            self.offsets = 2 * crop_padding + 1
            if crop_padding:
                images = torch.cat([
                    F.pad(chunk, 4 * (crop_padding,), mode='reflect') for chunk in images.split(10_000)])
            # A view (N, C, offsets, offsets, H, W): one index takes a random crop, without copying whole images.
            self.images = images.to(device).unfold(2, height, 1).unfold(3, width, 1)
        else:
            self.images = images.to(device)

    def __len__(self) -> int:
        """Batches in an epoch, the same for every process."""
        share = self.batch_size * self.world_size
        return self.num_images // share if self.train else -(-self.num_images // share)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, from 0, whose order and augmentation the next iteration yields."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        """Yields images float32 (B, C, H, W), channels last, and targets int64 (B,)."""
        yield from self._train_batches() if self.train else self._plain_batches()

    def _slice(self, batch: int) -> slice:
        start = (batch * self.world_size + self.rank) * self.batch_size
        return slice(start, start + self.batch_size)

    def _plain_batches(self) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        for batch in range(len(self)):
            part = self._slice(batch)
            yield normalize(self.images[part], self.mean, self.std), self.targets[part]

    def _train_batches(self) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.num_images, generator=generator)
        top, left = torch.randint(self.offsets, (2, self.num_images), generator=generator)
        flip = self._flips(order, generator)
        if self.device.type != 'cpu':
            order, top, left = (t.to(self.device) for t in (order, top, left))
            flip = None if flip is None else flip.to(self.device)
        for batch in range(len(self)):
            part = self._slice(batch)
            index = order[part]
            # Crop and flip as bytes, a quarter of the memory traffic of floats.
            x = self.images[index, :, top[part], left[part]]
            if flip is not None:
                x = torch.where(flip[part].view(-1, 1, 1, 1), x.flip(-1), x)
            if self.policy is not None:
                x = augment(x, self.policy).to(self.device)
            x = normalize(x, self.mean, self.std)
            if self.erasing is not None:
                x = self.erasing(x)
            yield x, self.targets[index]

    def _flips(self, order: torch.Tensor, generator: torch.Generator) -> Optional[torch.Tensor]:
        if self.hflip == 'none':
            return None
        if self.hflip == 'random':
            return torch.rand(self.num_images, generator=generator) < 0.5
        # Alternate: a fixed half of the images, then the other half, so no image repeats its orientation.
        fixed = torch.rand(self.num_images, generator=torch.Generator().manual_seed(self.seed)) < 0.5
        return fixed[order] ^ bool(self.epoch % 2)


class StreamingLoader:
    """Batches of files that are read and augmented one by one by timm's pipeline, in worker processes.

    Its randomness follows from the global generators at the beginning of a pass, with any number of workers: they start
    anew, seeded, for each. A file that cannot be read is left out of its batch and named once.

    Args:
        images: What to read, and how.
        args: Options of the run.
        device: For timm's loader, which yields batches on the CPU.
    """

    def __init__(self, images: Images, args: argparse.Namespace, device: torch.device):
        preprocess = images.preprocess
        if args.batch_size * args.world_size > len(images.split):
            raise InputError(
                f'{len(images.split)} training images do not fill one batch of {args.batch_size} x {args.world_size} '
                'processes: use a smaller --batch-size')
        self.named: Set[str] = set()
        self.loader = create_loader(
            _Files(images), preprocess.input_size, args.batch_size, is_training=True, scale=(0.6, 1.0),
            ratio=(0.8, 1.25), hflip=0. if args.hflip == 'none' else 0.5, color_jitter=None, auto_augment=args.aa,
            re_prob=args.reprob, re_count=args.recount, mean=preprocess.mean, std=preprocess.std,
            interpolation=preprocess.interpolation, num_workers=args.workers, collate_fn=_readable, device=device,
            distributed=args.distributed, use_prefetcher=False, persistent_workers=False)

    def __len__(self) -> int:
        return len(self.loader)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch whose order several processes share."""
        if hasattr(self.loader.sampler, 'set_epoch'):
            self.loader.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        for images, targets, errors in self.loader:
            for error in errors:
                if error not in self.named:
                    self.named.add(error)
                    _logger.warning(f'Left out: {error}')
            if images is not None:
                yield images, targets


class _Files(torch.utils.data.Dataset):
    """(image, target) of each file, or the message on why it cannot be read; timm sets the transform."""

    def __init__(self, images: Images):
        self.images, self.transform = images, None

    def __len__(self) -> int:
        return len(self.images.split)

    def __getitem__(self, index: int) -> Union[Tuple[Any, int], str]:
        split = self.images.split
        try:
            image, _ = self.images.preprocess.open(split.sources[index])
        except InputError as error:
            return str(error)
        return self.transform(image), int(split.targets[index])


def _readable(rows: Sequence[Any]) -> Tuple[Optional[torch.Tensor], Optional[torch.Tensor], List[str]]:
    """A batch without the files that cannot be read, and the messages on those."""
    read = [row for row in rows if not isinstance(row, str)]
    images = torch.stack([image for image, _ in read]) if read else None
    return images, torch.tensor([target for _, target in read]) if read else None, [
        row for row in rows if isinstance(row, str)]


class StreamedEvaluation:
    """Batches of files without augmentation, normalised; each process reads its share.

    Args:
        images: What to read, and how.
        device: Where batches are made.
        rank, world_size: This process and the number of processes.
    """

    def __init__(self, images: Images, device: torch.device, rank: int, world_size: int):
        share = images.split.at(torch.arange(len(images.split))[rank::world_size])
        self.images, self.device = Images(share, images.preprocess, images.batch_size), device

    def __iter__(self) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        mean, std = self.images.preprocess.mean, self.images.preprocess.std
        for images, targets in self.images:
            yield normalize(images.to(self.device), mean, std), targets.to(self.device)


def create_loaders(
        args: argparse.Namespace,
        splits: Splits,
        preprocess: Preprocessing,
        device: torch.device,
) -> Tuple[Iterable, Iterable]:
    """The loader of the training images and that of the development images, the latter without augmentation.

    If no images are held out, the log shows accuracy on the test images.

    Args:
        args: Options of the run; a missing `loader` is set.
        splits: Splits of the data set.
        preprocess: How the network sees images.
        device: Where batches are made.

    Raises:
        InputError: images that cannot be read, or options that do not fit them.
    """
    train = Images(splits['train'], preprocess, label='training images')
    height, width = preprocess.input_size[1:]
    batch = max(1, min(EVALUATION_BATCH, EVALUATION_BATCH * 96 * 96 // (height * width)))
    held_out = Images(splits.development if len(splits.development) else splits['test'], preprocess, batch)
    fits = train.bytes + held_out.bytes <= MEMORY_LIMIT
    args.loader = args.loader or ('memory' if fits else 'timm')
    shards = dict(rank=args.rank, world_size=args.world_size)
    common = dict(mean=preprocess.mean, std=preprocess.std, device=device)
    if fits or args.loader == 'memory':
        loader_eval: Iterable = InMemoryLoader(*held_out.stack(), batch, **common, **shards)
    else:
        loader_eval = StreamedEvaluation(held_out, device, **shards)
    if args.loader == 'timm':
        return StreamingLoader(train, args, device), loader_eval
    return InMemoryLoader(
        *train.stack(), args.batch_size, train=True, crop_padding=args.crop_padding, hflip=args.hflip, aa=args.aa,
        reprob=args.reprob, recount=args.recount, seed=args.seed, **common, **shards), loader_eval
