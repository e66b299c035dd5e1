"""From an image file to what a network sees: the same in training, evaluation, the commands and the app."""
from typing import Any, Dict, List, Optional, Tuple

import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

from ..datasets import normalize
from ..errors import InputError
from ..models import MultiExitNet
from ..pretrained.record import training_data
from .images import Source, read_image


class Preprocessing:
    """Reads, resizes, crops and normalises as the record of a network says.

    Args:
        data_config: timm's: input_size, mean, std, interpolation, crop_pct, crop_mode.
        value_range: Black and white of images with more than 8 bits a channel, see `images.read_image`.

    Attributes:
        input_size: (C, H, W).

    Raises:
        InputError: images of neither one nor three channels.
    """

    def __init__(self, data_config: Dict[str, Any], value_range: Optional[Tuple[float, float]] = None):
        self.input_size: Tuple[int, int, int] = tuple(data_config['input_size'])
        if self.input_size[0] not in (1, 3):
            raise InputError(f'{self.input_size[0]} channels: image files have 1 or 3; give tensors to the runner')
        self.mean, self.std = tuple(data_config['mean']), tuple(data_config['std'])
        self.interpolation: str = data_config['interpolation']
        self.value_range = value_range
        # "Prefetcher" is timm's word for stopping at uint8; normalisation is ours, for bit-equal inputs everywhere.
        self._resize: Any = create_transform(**data_config, use_prefetcher=True)

    @classmethod
    def of(cls, model: MultiExitNet) -> 'Preprocessing':
        """That of a network with its record."""
        return cls(resolve_data_config(model=model), training_data(model).value_range)

    def open(self, source: Source) -> Tuple[Image.Image, List[str]]:
        """The image as the network's channels need it, at its own size, and notes for its user.

        Raises:
            InputError: as `images.read_image`.
        """
        return read_image(source, min(self.input_size[1:]), self.input_size[0], self.value_range)

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """An image of `open` resized and cropped, uint8 (C, H, W)."""
        return torch.as_tensor(self._resize(image))

    def __call__(self, source: Source) -> Tuple[torch.Tensor, List[str]]:
        """What the network sees, float32 (C, H, W), and notes for its user.

        Raises:
            InputError: as `images.read_image`.
        """
        image, notes = self.open(source)
        return normalize(self.pixels(image)[None], self.mean, self.std)[0], notes
