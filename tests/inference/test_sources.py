"""Sources of images for `predict`: read from any image on, and damage costs what it touches."""
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import SAMPLES

pa = pytest.importorskip('pyarrow')

import pyarrow.parquet as pq  # noqa: E402

from timm_multiexit.errors import InputError  # noqa: E402
from timm_multiexit.inference.images import image_files  # noqa: E402
from timm_multiexit.inference.sources import count_images, open_sources, read_images  # noqa: E402

pytest_plugins = ['image_sources']  # its fixtures


@pytest.mark.parametrize('kind', ['folder', 'list', 'shards', 'parquet', 'hf'])
def test_skipping_keeps_the_rest(kind, sources):
    def read(skip):
        return [(item.path, item.image if isinstance(item.image, Path) else item.image.getvalue())
                for item in read_images(open_sources(list(map(str, sources[kind][0]))), skip)]
    whole = read(0)
    assert len(whole) == 40
    for skip in range(1, 43):
        assert read(skip) == whole[skip:]


@pytest.mark.parametrize('kind', ['folder', 'list', 'shards', 'parquet', 'hf'])
def test_counted_sources_are_passed_over(kind, sources, monkeypatch):
    places = open_sources(list(map(str, sources[kind][0]))) * 2
    whole = [item.path for item in read_images(places, 0)]
    assert count_images(places) == len(whole) == 80
    first = places[0].images
    for skip in (0, 1, first - 1):
        assert [item.path for item in read_images(places, skip)] == whole[skip:]
    monkeypatch.setattr(places[0], 'read', None)  # it is in the list twice
    rest = places[:1] + open_sources(list(map(str, sources[kind][0])))[1:] + open_sources([str(sources[kind][0][0])])
    assert [item.path for item in read_images(rest, first)] == whole[first:first + 40]


def test_a_row_group_is_not_read_as_a_whole(tmp_path):
    images = [np.random.default_rng(i).bytes(100_000) for i in range(400)]
    pq.write_table(pa.table(dict(image=images)), tmp_path / 'x.parquet', write_batch_size=8)
    sources, before = open_sources([str(tmp_path / 'x.parquet')]), pa.total_allocated_bytes()
    for number, item in enumerate(read_images(sources, 0)):
        assert item.image.getvalue() == images[number]
        assert pa.total_allocated_bytes() < before + 10_000_000  # of 40


def test_folders_are_walked_in_the_order_of_sorted_paths(tmp_path):
    for name in ('b/a.png', 'b.png', 'b c/x.JPG', 'b-/x.png', 'b/c/d.webp', 'a/z.png', '.a/b.png', 'b/.a.png', 'a/x'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / 'c.png').symlink_to(tmp_path / 'b.png')
    (tmp_path / 'broken.png').symlink_to(tmp_path / 'nope.png')
    (tmp_path / 'loop').symlink_to(tmp_path)
    found = image_files(tmp_path)
    assert found == sorted(found)
    assert {str(path.relative_to(tmp_path)) for path in found} == {
        'b/a.png', 'b.png', 'b c/x.JPG', 'b-/x.png', 'b/c/d.webp', 'a/z.png', 'c.png'}
    with pytest.raises(InputError, match='nope. cannot be read'):
        image_files(tmp_path / 'nope')


def test_a_damaged_shard_ends_in_an_error_and_the_next_one_is_read(sources, tmp_path):
    """However much is skipped, an image keeps its number."""
    (first, second), paths = sources['shards']
    data, draw = first.read_bytes(), random.Random(0)
    with tarfile.open(first) as tar:
        header = tar.getmember('007.png').offset
    cuts = [data[:n] for n in (header, header + 100, header + 512, header + 600, len(data) - 10240, len(data))]
    flipped = [data[:header + i] + b'\xff' + data[header + i + 1:] for i in (0, 130, 150)]
    for number, content in enumerate([*cuts, *flipped, *(data[:draw.randrange(512, len(data))] for _ in range(20))]):
        (tmp_path / 'cut.tar').write_bytes(content)
        names = [str(tmp_path / 'cut.tar'), str(second)]

        def read(skip, names=names):
            return [(item.path, str(item.image) if isinstance(item.image, Exception) else item.image.getvalue())
                    for item in read_images(open_sources(names), skip)]
        whole = read(0)
        assert [path for path, _ in whole[-25:]] == paths[15:]
        if number < 5:
            assert whole[-26][0] == names[0] and 'what follows in this shard cannot be read' in whole[-26][1]
        if number in (0, 6, 7, 8):
            assert len(whole) == 7 + 1 + 25
        for skip in (1, 6, 7, 8, 9, 15, 16, 17, 30):
            assert read(skip) == whole[skip:], (number, skip)


def test_a_compressed_shard_is_refused(tmp_path):
    with tarfile.open(tmp_path / 'shard.tar', 'w:gz') as tar:
        tar.add(SAMPLES, 'samples')
    with pytest.raises(InputError, match='is not an uncompressed tar file'):
        open_sources([str(tmp_path / 'shard.tar')])


def test_names_above_the_folder_are_read(tmp_path):
    with tarfile.open(tmp_path / 'shard.tar', 'w') as tar:
        for name in ('../photos/a.png', 'b/.hidden/c.png'):
            tar.add(next(SAMPLES.glob('*.png')), name)
    assert [item.path for item in read_images(open_sources([str(tmp_path / 'shard.tar')]), 0)] == [
        f'{tmp_path}/shard.tar/../photos/a.png']


def test_a_list_of_relative_paths_is_of_its_folder(tmp_path, monkeypatch):
    (tmp_path / 'list.txt').write_text(f'a.png\n{tmp_path}/b.png\n')
    (tmp_path / 'absolute.txt').write_text(f'{tmp_path}/a.png\n')
    monkeypatch.chdir(tmp_path)
    relative, absolute = open_sources(['list.txt', 'absolute.txt'])
    assert relative.record['relative_to'] == str(tmp_path) and 'relative_to' not in absolute.record


def test_a_damaged_row_group_costs_its_own_rows(sources, tmp_path):
    (path,), paths = sources['parquet']
    group = pq.read_metadata(path).row_group(1)
    column = next(group.column(i) for i in range(3) if group.column(i).path_in_schema == 'image')
    start = column.dictionary_page_offset or column.data_page_offset
    data = bytearray(path.read_bytes())
    data[start:start + 200] = b'\xff' * 200
    (tmp_path / 'x.parquet').write_bytes(data)
    items = list(read_images(open_sources([str(tmp_path / 'x.parquet')]), 0))
    assert len(items) == 40
    lost = [i for i, item in enumerate(items) if isinstance(item.image, Exception)]
    assert lost == list(range(17, 34)) and items[33].path == f'{tmp_path}/x.parquet/33'
    assert items[34].path == paths[34]
