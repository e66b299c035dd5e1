"""The images of a split, decoded: whole in memory or in batches. Files that cannot be read are left out and named."""
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, Iterator, List, Optional, Sequence, Tuple, TypeVar, Union

import torch
from tqdm import tqdm

from ..errors import InputError
from ..inference.images import Source, image_header, raw_range
from ..inference.preprocess import Preprocessing
from .splits import Split

_logger = logging.getLogger(__name__)
THREADS = min(8, os.cpu_count() or 1)  # Pillow decodes without Python's lock
AHEAD = 64  # images
T = TypeVar('T')


def _read(function: Callable[[Source], T], sources: Sequence[Source]) -> Iterator[Union[T, InputError]]:
    """What a function gives for each image, in order, or its error; a few images ahead, on threads."""
    def one(i: int) -> Union[T, InputError]:
        try:
            return function(sources[i])
        except InputError as error:
            return error

    if len(sources) < 2:
        yield from map(one, range(len(sources)))
        return
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(sources), AHEAD):
            yield from pool.map(one, range(start, min(start + AHEAD, len(sources))))


def image_sizes(split: Split) -> Tuple[List[Tuple[int, int]], bool]:
    """Sizes (height, width) that occur, from the files' headers, and whether any has more than 8 bits a channel."""
    if split.pixels is not None:
        return [tuple(split.pixels.shape[2:])], False
    headers = [h for h in _read(image_header, split.sources) if not isinstance(h, InputError)]
    return sorted({(size[1], size[0]) for size, _ in headers}), any(deep for _, deep in headers)


def value_range(split: Split) -> Optional[Tuple[float, float]]:
    """Minimum and maximum raw value over all images with more than 8 bits a channel; None if there are none."""
    ranges = [r for r in _read(raw_range, split.sources) if isinstance(r, tuple)]
    return (min(low for low, _ in ranges), max(high for _, high in ranges)) if ranges else None


class Images:
    """Batches of a split as its network sees them, resized and cropped but neither augmented nor normalised.

    Args:
        split: What to read.
        preprocess: How the network sees images.
        batch_size: Images per batch.
        label: Text of the progress bar, which is drawn on terminals only; '' for none.
    """

    def __init__(self, split: Split, preprocess: Preprocessing, batch_size: int = 256, label: str = ''):
        self.split, self.preprocess, self.batch_size, self.label = split, preprocess, batch_size, label
        self.decoded = split.pixels is not None and tuple(split.pixels.shape[1:]) == preprocess.input_size
        self._named = False

    @property
    def bytes(self) -> int:
        """Size of all images in memory."""
        channels, height, width = self.preprocess.input_size
        return len(self.split) * channels * height * width

    def __iter__(self) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        """Yields images uint8 (B, C, H, W) and targets int64 (B,).

        Raises:
            InputError: none of the images can be read.
        """
        if self.decoded:
            yield from zip(self.split.pixels.split(self.batch_size), self.split.targets.split(self.batch_size))
            return
        images: List[torch.Tensor] = []
        targets: List[int] = []
        unreadable: List[InputError] = []
        rows = zip(_read(self._pixels, self.split.sources), self.split.targets.tolist())
        for row, target in tqdm(rows, self.label, len(self.split), unit='image', disable=None if self.label else True):
            if isinstance(row, InputError):
                unreadable.append(row)
                continue
            images.append(row)
            targets.append(target)
            if len(images) == self.batch_size:
                yield torch.stack(images), torch.tensor(targets)
                images, targets = [], []
        if images:
            yield torch.stack(images), torch.tensor(targets)
        if len(unreadable) == len(self.split) > 0:
            raise InputError(f'no image of {self.split.title} can be read: {unreadable[0]}')
        if unreadable and not self._named:
            self._named = True
            reasons = '; '.join(map(str, unreadable[:5])) + ('; ...' if len(unreadable) > 5 else '')
            _logger.warning(
                f'{len(unreadable)} of {len(self.split)} files of {self.split.title} are left out: {reasons}')

    def _pixels(self, source: Source) -> torch.Tensor:
        return self.preprocess.pixels(self.preprocess.open(source)[0])

    def stack(self) -> Tuple[torch.Tensor, torch.Tensor]:
        """All images uint8 (N, C, H, W) and targets int64 (N,).

        Raises:
            InputError: none of the images can be read.
        """
        if self.decoded:
            return self.split.pixels, self.split.targets
        images = torch.empty((len(self.split), *self.preprocess.input_size), dtype=torch.uint8)
        targets, n = [], 0
        for x, y in self:
            images[n:n + len(x)] = x
            targets.append(y)
            n += len(x)
        return images[:n], torch.cat(targets) if targets else self.split.targets[:0]
