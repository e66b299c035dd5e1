"""The one reader of image files: RGB from any mode, with a note or an error for what is unusual."""
import warnings
from pathlib import Path
from typing import List, Tuple, Union

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import InputError

# Above this, decoding takes gigabytes (PIL's own limit for a "decompression bomb").
MAX_PIXELS = 180_000_000
# A photo is decoded at a fraction of its size where the format allows (JPEG): the network sees few pixels anyway.
DRAFT_SIZE = 1024


def read_image(source: Union[str, Path, Image.Image], size: int = 32) -> Tuple[Image.Image, List[str]]:
    """One image as RGB, upright.

    Greyscale is repeated over the channels, 16-bit is scaled to 8, transparency is composited over white, and an
    animation gives its first frame.

    Args:
        source: A file or an open image.
        size: Smaller side that the network will see, in pixels.

    Returns:
        The image, and notes that matter for the answer (shrunk, first frame, ...).

    Raises:
        InputError: no such file, a folder, not an image, truncated, or too large to decode.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, size)
    path = Path(source)
    if path.is_dir():
        raise InputError(f"'{path}' is a folder: give its images, like {path}/*.png")
    if not path.is_file():
        raise InputError(f"'{path}' does not exist: check the name")
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', Image.DecompressionBombWarning)  # MAX_PIXELS is the limit here
        try:
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise InputError(
                        f"'{path}' has {image.width} x {image.height} pixels: shrink it below {MAX_PIXELS // 10 ** 6} "
                        'million')
                return _to_rgb(image, size)
        except UnidentifiedImageError:
            raise InputError(f"'{path}' is not an image: give a PNG, JPEG, WebP or another file that Pillow reads"
                             ) from None
        except Image.DecompressionBombError:
            raise InputError(f"'{path}' has far too many pixels: shrink it below {MAX_PIXELS // 10 ** 6} million"
                             ) from None
        except (OSError, SyntaxError, ValueError, EOFError) as error:
            raise InputError(f"'{path}' is damaged or truncated ({error}): save it again") from None


def _to_rgb(image: Image.Image, size: int) -> Tuple[Image.Image, List[str]]:
    notes = []
    full = image.size
    frames = getattr(image, 'n_frames', 1)
    if frames > 1:
        notes.append(f'animated, {frames} frames: only the first is classified')
        image.seek(0)
    image.draft('RGB', (DRAFT_SIZE, DRAFT_SIZE))
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith('I') or image.mode == 'F':
        image = _scale_deep(image)
        notes.append('more than 8 bits a channel: scaled to 8')
    if image.has_transparency_data:
        image = image.convert('RGBA')
        if np.asarray(image.getchannel('A')).min() < 255:
            notes.append('transparent: shown over white')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    if min(full) >= 8 * size:
        notes.append(f'shrunk from {full[0]} x {full[1]} to {size} x {size}: one large object in the middle works best')
    return image.convert('RGB'), notes


def _scale_deep(image: Image.Image) -> Image.Image:
    values = np.asarray(image, dtype=np.float64)
    # 16 bits unless the values say otherwise (32-bit integers or floats have no fixed white).
    top = 65535. if image.mode.startswith('I;16') or 255. < values.max() <= 65535. else max(values.max(), 1e-12)
    return Image.fromarray((values.clip(0., top) * (255. / top)).round().astype(np.uint8))
