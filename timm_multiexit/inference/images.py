"""The one reader of image files, for training and all that follows: 8-bit RGB or grey from any mode.

What is unusual becomes a note or an error.
"""
import errno
import glob
import os
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..errors import InputError, UnreachableError

# Above this, decoding takes gigabytes (PIL's own limit for a "decompression bomb").
MAX_PIXELS = 180_000_000
_ORIENTATION = 0x0112  # in EXIF
_TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
          5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
          8: Image.Transpose.ROTATE_90}
# A photo is decoded at a fraction of its size where the format allows (JPEG): the network sees few pixels anyway.
DRAFT_SIZE = 1024
SUFFIXES = frozenset('.avif .bmp .gif .jfif .jp2 .jpeg .jpg .pgm .png .ppm .tif .tiff .webp'.split())
Source = Union[str, Path, BinaryIO, Image.Image]
# Of strangers, photos alone: Pillow knows formats that start other programs, and pixels take memory.
SENT_FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP')  # not GIF: comments and frames without end occupy its reader
SENT_PIXELS = 16_000_000


def is_hidden(name: str) -> bool:
    """Whether a file or folder is not part of a data set: '.ipynb_checkpoints', or '._a.jpg' of a Mac."""
    return name.startswith('.') or name == '__MACOSX'


def walk_images(folder: Path) -> Iterator[Path]:
    """The images in a folder and its subfolders, by their suffix and not hidden, in the order of sorted paths.

    Of millions, the names of one folder at a time, and of those above it, are in memory.

    Raises:
        InputError: a folder cannot be read.
    """
    names, folders = [], set()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_hidden(entry.name):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.add(entry.name)
                elif Path(entry.name).suffix.lower() not in SUFFIXES or not entry.is_file():
                    continue
                names.append(entry.name)
    except OSError as error:
        raise InputError(f"'{folder}' cannot be read ({error.strerror}): check the folder") from error
    for name in sorted(names):
        if name in folders:
            yield from walk_images(folder / name)
        else:
            yield folder / name


def image_files(folder: Path) -> List[Path]:
    """All of `walk_images`."""
    return list(walk_images(folder))


def image_paths(folder: Union[str, Path]) -> List[Path]:
    """As `image_files`, of a folder that must hold some.

    Raises:
        InputError: no folder, or none in it.
    """
    if not Path(folder).is_dir():
        raise InputError(f"'{folder}' is not a folder: give a folder of images")
    paths = image_files(Path(folder))
    if not paths:
        raise InputError(f"'{folder}' holds no images: give a folder of {', '.join(sorted(SUFFIXES))} files")
    return paths


def named_images(given: Sequence[str]) -> List[Path]:
    """The files that arguments name: as a shell would expand patterns, and the images of folders.

    What names nothing stays, for the reader to refuse.

    Raises:
        InputError: a folder without images.
    """
    files: List[Path] = []
    for name in given:
        if Path(name).is_dir():
            files += image_paths(name)
        elif Path(name).exists():  # also a file with brackets in its name
            files.append(Path(name))
        else:
            files += map(Path, sorted(glob.glob(name, recursive=True)) or [name])
    return files


def read_image(
        source: Source,
        size: int = 32,
        channels: int = 3,
        value_range: Optional[Tuple[float, float]] = None,
) -> Tuple[Image.Image, List[str]]:
    """One image as 8-bit RGB or grey, upright.

    Greyscale is repeated over three channels, transparency is composited over white, and an animation gives its first
    frame.

    Args:
        source: A file, by name or open, or an image.
        size: Smaller side that the network will see, in pixels.
        channels: 3 for RGB, 1 for grey.
        value_range: Raw values that are black and white in images of more than 8 bits a channel, those of the data set
            that the network was trained on; None to guess them for each image, with a note.

    Returns:
        The image, and notes that matter for the answer (shrunk, first frame, ...).

    Raises:
        InputError: no such file, a folder, not an image, truncated, or too large to decode.
    """
    with _opened(source) as image:
        return _to_8_bits(image, size, channels, value_range)


def raw_range(source: Source) -> Optional[Tuple[float, float]]:
    """Minimum and maximum raw value of an image with more than 8 bits a channel; None for other images.

    Raises:
        InputError: as `read_image`.
    """
    with _opened(source) as image:
        if not _is_deep(image):
            return None
        values = np.asarray(image)
        values = values[np.isfinite(values)]
        return (float(values.min()), float(values.max())) if values.size else None


def image_header(source: Source) -> Tuple[Tuple[int, int], bool]:
    """(width, height) and whether there are more than 8 bits a channel, without decoding pixels.

    Raises:
        InputError: no such file, or not an image.
    """
    with _opened(source) as image:
        turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
        return ((image.height, image.width) if turned else (image.width, image.height)), _is_deep(image)


@contextmanager
def _opened(source: Source) -> Iterator[Image.Image]:
    """An open image; errors while it is open become InputErrors that name the file."""
    if isinstance(source, Image.Image):
        yield source
        return
    name = 'the image'
    if isinstance(source, (str, Path)):
        name = f"'{source}'"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # MAX_PIXELS is the limit here; notes of Pillow on damaged EXIF help nobody
        try:
            if isinstance(source, (str, Path)):
                if Path(source).is_dir():
                    raise InputError(f'{name} is a folder: give its images, like {source}/*.png')
                if not Path(source).is_file():
                    raise InputError(f"{name} {'matches no file' if '*' in name else 'does not exist'}: check the name")
            with Image.open(source) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise InputError(
                        f'{name} has {image.width} x {image.height} pixels: shrink it below {MAX_PIXELS // 10 ** 6} '
                        'million')
                if max(image.size) > 1000 * min(image.size):  # resizing would blow it up
                    raise InputError(f'{name} has {image.width} x {image.height} pixels: crop it')
                yield image
        except UnidentifiedImageError:
            raise InputError(f'{name} is not an image: give a PNG, JPEG, WebP or another file that Pillow reads'
                             ) from None
        except Image.DecompressionBombError:
            raise InputError(f'{name} has far too many pixels: shrink it below {MAX_PIXELS // 10 ** 6} million'
                             ) from None
        except (InputError, MemoryError):
            raise
        except Exception as error:  # Pillow's readers let many types through on damaged files
            if isinstance(error, OSError) and error.errno not in (
                    None, errno.EINVAL, errno.ENAMETOOLONG):  # a seek outside, a bad name
                raise UnreachableError(f'{name} cannot be read ({error.strerror}): check the disk and permissions'
                                       ) from None
            raise InputError(f'{name} is damaged or truncated ({error}): save it again') from None


def check_sent(source: Union[str, Path, BinaryIO]) -> None:
    """Checks from its first bytes that a stranger's file is a photo that can be decoded cheaply.

    Raises:
        InputError: another format, too many pixels, or a strip, which resizing to the network's height would blow up.
    """
    try:
        with Image.open(source, formats=SENT_FORMATS) as image:
            (short, long), format = sorted(image.size), image.format
    except Exception:  # Pillow raises many types for what is not an image
        raise InputError(f"this is not an image in a supported format: send {', '.join(SENT_FORMATS)}") from None
    # JPEG is decoded at a fraction of its size.
    limit = 4 * SENT_PIXELS if format in ('JPEG', 'MPO') else SENT_PIXELS
    if short * long > limit:
        raise InputError(
            f'{short * long / 1e6:.0f} million pixels are too many: shrink the image below {limit / 1e6:.0f}')
    if long > 100 * short:
        raise InputError(f'{long} x {short} pixels are too long and thin: crop the image')


def _is_deep(image: Image.Image) -> bool:
    return image.mode.startswith('I') or image.mode == 'F'


def _to_8_bits(
        image: Image.Image,
        size: int,
        channels: int,
        value_range: Optional[Tuple[float, float]],
) -> Tuple[Image.Image, List[str]]:
    notes = []
    full = image.size
    frames = getattr(image, 'n_frames', 1)
    if frames > 1 and image.format != 'MPO':  # several pictures in one JPEG, as phones write them
        notes.append(f'animated, {frames} frames: only the first is classified')
        image.seek(0)
    # Pillow keeps the upper 8 of 16 bits of colours: 12-bit colours come out black.
    halved = not _is_deep(image) and ';16' in str([tile[3] for tile in getattr(image, 'tile', [])])
    side = max(DRAFT_SIZE, 2 * size)
    image.draft('RGB', (side, side))
    image.load()
    turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))  # exif_transpose fails on EXIF that it cannot write again
    image = image if turn is None else image.transpose(turn)
    if _is_deep(image):
        low, high = value_range or _likely_range(np.asarray(image))
        if value_range is None:
            notes.append(f'more than 8 bits a channel: {low:g} is taken for black and {high:g} for white, a guess from '
                         'this image alone')
        image = _scale(image, low, high)
    elif halved and np.asarray(image.convert('RGB')).max() < 64:
        raise ValueError('its 16-bit colours use the lowest bits only, which Pillow drops; store 8 bits a channel')
    if image.has_transparency_data:
        image = image.convert('RGBA')
        if np.asarray(image.getchannel('A')).min() < 255:
            notes.append('transparent: shown over white')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    if min(full) >= 8 * size:
        notes.append(f'shrunk from {full[0]} x {full[1]} to {size} x {size}: one large object in the middle works best')
    return image.convert('RGB' if channels == 3 else 'L'), notes


def _likely_range(values: np.ndarray) -> Tuple[float, float]:
    """Black and white of one image: the least depth that holds its integers, 0 to 1, or else its extremes."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0., 1.)
    if low >= 0. and values.dtype.kind in 'iu' and high <= 65535.:
        bits = next(b for b in (8, 10, 12, 14, 16) if high < 2 ** b)
        return 0., 2. ** bits - 1.
    if low >= 0. and high <= 1.:
        return 0., 1.
    return low, high


def _scale(image: Image.Image, low: float, high: float) -> Image.Image:
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), nan=low)
    values = (values.clip(low, high) - low) * (255. / max(high - low, 1e-12))
    return Image.fromarray(values.round().astype(np.uint8))
