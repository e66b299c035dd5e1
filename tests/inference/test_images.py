"""Image files of every kind, good and bad."""
import errno
import struct

import numpy as np
import pytest
from conftest import SAMPLES
from PIL import Image, ImageOps

from timm_multiexit.errors import InputError, UnreachableError
from timm_multiexit.inference.images import read_image


@pytest.fixture
def picture() -> Image.Image:
    return Image.open(sorted(SAMPLES.glob('*_frog.png'))[0])


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_plain_image_comes_back_unchanged(picture, tmp_path):
    picture.save(tmp_path / 'a.png')
    image, notes = read_image(tmp_path / 'a.png')
    assert image.mode == 'RGB' and notes == []
    assert (pixels(image) == pixels(picture)).all()


@pytest.mark.parametrize('kind, notes', [('MPO', []), ('GIF', ['animated, 2 frames: only the first is classified'])])
def test_a_photo_of_several_pictures_is_not_animated(picture, tmp_path, kind, notes):
    picture.save(tmp_path / 'a.jpg', format=kind, save_all=True, append_images=[ImageOps.mirror(picture)])
    assert read_image(tmp_path / 'a.jpg')[1] == notes


def test_greyscale_is_repeated_over_the_channels(picture, tmp_path):
    picture.convert('L').save(tmp_path / 'a.png')
    image, _ = read_image(tmp_path / 'a.png')
    assert image.mode == 'RGB'
    for channel in range(3):
        assert (pixels(image)[..., channel] == pixels(picture.convert('L'))).all()


def test_transparency_is_laid_over_white(picture, tmp_path):
    rgba = picture.convert('RGBA')
    rgba.putalpha(Image.new('L', rgba.size, 0))
    rgba.save(tmp_path / 'a.png')
    image, notes = read_image(tmp_path / 'a.png')
    assert (pixels(image) == 255).all() and 'transparent' in notes[0]


def test_opaque_rgba_has_nothing_to_note(picture, tmp_path):
    picture.convert('RGBA').save(tmp_path / 'a.png')
    image, notes = read_image(tmp_path / 'a.png')
    assert notes == [] and (pixels(image) == pixels(picture)).all()


def test_sixteen_bits_are_scaled_not_clipped(picture, tmp_path):
    grey = pixels(picture.convert('L'))
    Image.fromarray((grey * 257).astype(np.uint16)).save(tmp_path / 'a.png')
    image, notes = read_image(tmp_path / 'a.png')
    assert (pixels(image)[..., 0] == grey).all() and '8 bits' in notes[0]


def test_first_frame_of_an_animation(picture, tmp_path):
    frames = [picture, picture.rotate(90), picture.rotate(180)]
    frames[0].save(tmp_path / 'a.webp', save_all=True, append_images=frames[1:], lossless=True)
    image, notes = read_image(tmp_path / 'a.webp')
    assert '3 frames' in notes[0] and (pixels(image) == pixels(picture)).all()


def test_photo_is_turned_upright(tmp_path):
    photo = Image.new('RGB', (40, 20))
    exif = photo.getexif()
    exif[0x0112] = 6  # the camera was turned
    photo.save(tmp_path / 'a.jpg', exif=exif)
    assert read_image(tmp_path / 'a.jpg')[0].size == (20, 40)


def test_huge_photo_is_decoded_small(tmp_path):
    Image.new('RGB', (12_000, 9_000), 'red').save(tmp_path / 'a.jpg')
    image, notes = read_image(tmp_path / 'a.jpg')
    assert max(image.size) <= 2048 and 'shrunk from 12000 x 9000' in notes[-1]


def truncated(tmp_path):
    source = sorted(SAMPLES.glob('*.png'))[0].read_bytes()
    (tmp_path / 'cut.png').write_bytes(source[:len(source) // 2])
    return tmp_path / 'cut.png'


def text(tmp_path):
    (tmp_path / 'notes.png').write_text('not an image')
    return tmp_path / 'notes.png'


def empty(tmp_path):
    (tmp_path / 'empty.png').touch()
    return tmp_path / 'empty.png'


def bomb(tmp_path):
    Image.new('1', (20_000, 20_000)).save(tmp_path / 'bomb.png')
    return tmp_path / 'bomb.png'


def page_without_a_size(tmp_path):
    path = tmp_path / 'pages.tif'
    Image.new('RGB', (8, 8)).save(path)
    data = bytearray(path.read_bytes())
    entries, = struct.unpack_from('<H', data, 8)
    struct.pack_into('<I', data, 10 + 12 * entries, len(data))  # where a second page is described, by one tag
    path.write_bytes(data + struct.pack('<HHHIII', 1, 254, 4, 1, 0, 0))
    return path


@pytest.mark.parametrize('make, message', [
    (truncated, 'truncated'), (text, 'not an image'), (empty, 'not an image'), (bomb, 'shrink it'),
    (page_without_a_size, 'damaged'),
    (lambda p: p, 'is a folder'), (lambda p: p / 'none.png', 'does not exist'),
    (lambda p: p / '*.png', 'matches no file'),
])
def test_bad_files_are_named(make, message, tmp_path):
    path = make(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        read_image(path)
    assert str(path) in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('turn', range(1, 9))
def test_photos_are_turned_upright_whatever_else_is_in_their_exif(tmp_path, turn):
    picture = Image.fromarray(np.random.default_rng(0).integers(256, size=(20, 30, 3), dtype=np.uint8))
    # The name of the software, as a fraction: Pillow cannot write it again.
    exif = (b'Exif\0\0II*\0' + struct.pack('<IH', 8, 2) + struct.pack('<HHIHH', 0x0112, 3, 1, turn, 0)
            + struct.pack('<HHII', 0x0131, 5, 1, 38) + struct.pack('<III', 0, 1, 2))
    picture.save(tmp_path / 'a.jpg', exif=exif)
    plain = Image.Exif()
    plain[0x0112] = turn
    picture.save(tmp_path / 'b.jpg', exif=plain)
    expected = ImageOps.exif_transpose(Image.open(tmp_path / 'b.jpg'))
    assert (pixels(read_image(tmp_path / 'a.jpg')[0]) == pixels(expected)).all()


def test_the_disk_is_not_the_file_s_fault(picture, tmp_path, monkeypatch):
    picture.save(tmp_path / 'a.png')

    def unplugged(*args):
        raise OSError(errno.EIO, 'Input/output error')
    monkeypatch.setattr(Image, 'open', unplugged)
    with pytest.raises(UnreachableError, match=r'cannot be read \(Input/output error\): check the disk'):
        read_image(tmp_path / 'a.png')


def test_an_animation_cut_anywhere_is_read_or_named(tmp_path):
    path = tmp_path / 'cut.gif'
    Image.new('RGB', (8, 8)).save(path, save_all=True, append_images=[Image.new('RGB', (8, 8), 'red')])
    whole, refused = path.read_bytes(), 0
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        try:
            read_image(path)
        except InputError:
            refused += 1
    assert 0 < refused < len(whole)
