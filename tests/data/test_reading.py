"""One reader for training, evaluation, commands and runner: every kind of file gives all of them the same pixels."""
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from timm_multiexit.data.images import Images, image_sizes, value_range
from timm_multiexit.data.splits import Split
from timm_multiexit.datasets import normalize
from timm_multiexit.errors import InputError
from timm_multiexit.inference.preprocess import Preprocessing

VALUES = np.arange(24 * 24).reshape(24, 24) / (24 * 24 - 1)
GREY = (255 * VALUES).round().astype(np.uint8)


def preprocessing(channels=3, size=24, limits=None):
    return Preprocessing(dict(input_size=(channels, size, size), mean=(.5,) * channels, std=(.25,) * channels,
                              interpolation='bilinear', crop_pct=1., crop_mode='center'), limits)


def split(*files):
    return Split('test/', list(files), torch.zeros(len(files), dtype=torch.int64))


def save(image, path, **kwargs):
    image.save(path, **kwargs)
    return path


def upside_down(path):
    exif = Image.Exif()
    exif[0x0112] = 3
    return save(Image.fromarray(GREY[::-1, ::-1]), path.with_suffix('.png'), exif=exif)


def cut_out(path):
    rgba = np.dstack([GREY, GREY, GREY, np.full_like(GREY, 255)])
    rgba[:4] = 0  # transparent, over white
    return save(Image.fromarray(rgba), path.with_suffix('.png'))


def twelve_bits(path):
    return save(Image.fromarray((4095 * VALUES).round().astype(np.uint16)), path.with_suffix('.png'))


def signed(path):
    return save(Image.fromarray((3000 * VALUES - 1000).round().astype(np.int32)), path.with_suffix('.tif'))


def real(path):
    return save(Image.fromarray((7 * VALUES - 2).astype(np.float32)), path.with_suffix('.tiff'))


def palette(path):
    return save(Image.fromarray(GREY).quantize(256), path.with_suffix('.gif'))


def cmyk(path):
    return save(Image.fromarray(GREY).convert('RGB').convert('CMYK'), path.with_suffix('.tif'))


EXPECTED = np.where(np.arange(24)[:, None] < 4, 255, GREY)
KINDS = [(upside_down, GREY), (cut_out, EXPECTED), (twelve_bits, GREY), (signed, GREY), (real, GREY), (palette, GREY),
         (cmyk, GREY)]


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('make, expected', KINDS, ids=lambda x: getattr(x, '__name__', ''))
def test_every_kind_of_file(tmp_path, make, expected, channels):
    path = make(tmp_path / 'a')
    (height_width,), deep = image_sizes(split(path))
    limits = value_range(split(path))
    assert height_width == (24, 24) and deep == (limits is not None) == (make in (twelve_bits, signed, real))
    preprocess = preprocessing(channels, limits=limits)
    images, _ = Images(split(path, path), preprocess).stack()
    assert images.dtype == torch.uint8 and images.shape == (2, channels, 24, 24)
    assert np.abs(images[0].numpy().astype(int) - expected).max() <= 1
    x, notes = preprocess(path)
    assert torch.equal(x, normalize(images[1:], preprocess.mean, preprocess.std)[0])
    assert not [n for n in notes if 'guess' in n]


def test_raw_values_go_by_the_data_set_not_by_the_image(tmp_path):
    """A dark scan stays dark: black and white are those of all training images."""
    files = [save(Image.fromarray((4095 * scale * VALUES).round().astype(np.uint16)), tmp_path / f'{scale}.png')
             for scale in (0.25, 1.)]
    assert value_range(split(*files)) == (0., 4095.)
    dark, bright = Images(split(*files), preprocessing(limits=(0., 4095.))).stack()[0]
    assert dark.max() == 64 and bright.max() == 255
    _, notes = preprocessing()(files[0])
    assert 'a guess from this image alone' in notes[0]  # 1,023 fills 10 bits


def test_colours_whose_upper_bits_are_empty_are_refused(tmp_path):
    """Pillow reads the upper 8 of 16 bits of colours only."""
    import struct
    import zlib
    rows = b''.join(b'\0' + (np.full((24, 3), 2000, '>u2')).tobytes() for _ in range(24))

    def chunk(kind, body):
        return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))

    path = tmp_path / 'a.png'
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', 24, 24, 16, 2, 0, 0, 0))
                     + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b''))
    with pytest.raises(InputError, match='store 8 bits a channel'):
        preprocessing()(path)


def test_photos_of_different_sizes(tmp_path):
    files = [save(Image.fromarray(np.full((h, w, 3), 100, np.uint8)), tmp_path / f'{h}.jpg')
             for h, w in ((30, 50), (200, 90), (12, 12))]
    assert image_sizes(split(*files)) == ([(12, 12), (30, 50), (200, 90)], False)
    assert Images(split(*files), preprocessing()).stack()[0].shape == (3, 3, 24, 24)


def test_unreadable_files_are_named_once_and_left_out(tmp_path, caplog):
    good = [save(Image.fromarray(np.full((24, 24), i, np.uint8)), tmp_path / f'{i}.png') for i in range(5)]
    whole = save(Image.fromarray(GREY), tmp_path / 'whole.png')
    (tmp_path / 'cut.png').write_bytes(whole.read_bytes()[:100])
    (tmp_path / 'text.png').write_text('no image')
    files = [good[0], tmp_path / 'cut.png', good[1], tmp_path / 'text.png', *good[2:]]
    data = Images(Split('val/', files, torch.arange(7)), preprocessing(), batch_size=2)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            batches = list(data)
    images, targets = (torch.cat(parts) for parts in zip(*batches))
    assert targets.tolist() == [0, 2, 4, 5, 6] and images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    (record,) = caplog.records
    assert '2 of 7 files of val/ are left out' in record.message
    assert 'cut.png' in record.message and 'text.png' in record.message
    with pytest.raises(InputError, match='no image of val/ can be read'):
        list(Images(Split('val/', files[1:2], torch.zeros(1)), preprocessing()))
