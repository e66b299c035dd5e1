"""An in-memory loader that augments whole batches where the data lies."""
from typing import Callable, Iterator, Optional, Sequence, Tuple, Union

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.auto_augment import auto_augment_transform, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.layers import to_2tuple

from ..datasets import normalize
from ..errors import InputError


def augmentation_policy(name: str, image_size: Sequence[int], mean: Sequence[float]) -> Callable:
    """timm's RandAugment or AutoAugment for images of one size, by the name timm's --aa takes.

    Args:
        name: Policy, e.g. 'rand-m7-n2-mstd0.5-inc1' or 'original'.
        image_size: Height and width, pixels.
        mean: Per channel, in 0-1: the colour of what moves into the picture.

    Returns:
        A function of a PIL image; its choices come from Python's and NumPy's global generators.

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
    """uint8 (B, 3, H, W) to the same on the CPU, each image changed by `policy` alone."""
    arrays = images.permute(0, 2, 3, 1).cpu().numpy()
    changed = np.stack([np.asarray(policy(Image.fromarray(array))) for array in arrays])
    return torch.from_numpy(changed).permute(0, 3, 1, 2)


class InMemoryLoader:
    """Batches of augmented images, made by tensor operations on the device where the images lie.

    An epoch's order and augmentation follow from (seed, epoch) alone, so a resumed run sees what the uninterrupted one
    would have seen. Several processes share the batches of one order: process r of w takes the r-th of w slices
    of each global batch, and all get equally many.

    Args:
        images: uint8 (N, C, H, W).
        targets: int64 (N,).
        batch_size: Images a batch and process.
        mean, std: Per channel, in 0-1.
        train: Shuffle, augment, and leave out the last incomplete batch.
        crop_padding: Pixels of reflected border around the random crop.
        hflip: 'random', 'alternate' (each image flips every other epoch, half of them in even epochs), or 'none'.
        aa: timm's policy of colour and shape changes, image by image ('rand-m7-n2-mstd0.5-inc1', 'original', ...), or
            none. It runs on the CPU, after crop and flip.
        reprob: Probability of random erasing (timm's RandomErasing, mode 'const').
        recount: Regions to erase.
        seed: Seed of everything random here.
        device: Where images are kept and batches are made.
        rank, world_size: This process and their number.
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
        # On the device once: numbers copied there for each batch would wait for the step before.
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
            self.image_size = to_2tuple(tuple(images.shape[-2:]))
            self.offsets = 2 * crop_padding + 1
            if crop_padding:
                images = torch.cat([
                    F.pad(chunk, 4 * (crop_padding,), mode='reflect') for chunk in images.split(10_000)])
            # A view (N, C, offsets, offsets, H, W): a random crop is then one index, without copies of whole images.
            height, width = self.image_size
            self.images = images.to(device).unfold(2, height, 1).unfold(3, width, 1)
        else:
            self.images = images.to(device)

    def __len__(self) -> int:
        """Batches in an epoch, the same for every process."""
        share = self.batch_size * self.world_size
        return self.num_images // share if self.train else -(-self.num_images // share)

    def set_epoch(self, epoch: int) -> None:
        """The epoch (from 0) whose order and augmentation the next iteration yields."""
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
        # Alternate: a fixed half of the images, then the other half, so no image is seen the same way twice running.
        fixed = torch.rand(self.num_images, generator=torch.Generator().manual_seed(self.seed)) < 0.5
        return fixed[order] ^ bool(self.epoch % 2)
