"""Images for `predict`, some damaged, as sources of every kind that it reads."""
import io
import tarfile

import numpy as np
import pytest
from conftest import save_noise

DAMAGED = (4, 11, 29)


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    """40 files in folders, three of them damaged, beside what is no image."""
    place, rng = tmp_path_factory.mktemp('photos'), np.random.default_rng(0)
    for name in ('a', 'a/été', '.hidden', 'a.png'):  # a folder may be named like an image
        (place / name).mkdir()
    for i in range(40):
        save_noise(place / ('a', 'a/été', 'a.png')[i % 3] / f'{i:02}.png', rng)
    for name in ('.hidden/a.png', 'a/._b.png', 'a/text.txt'):
        (place / name).write_bytes(b'no image')
    paths = sorted(place.rglob('[0-9]*.png'))
    for i, data in zip(DAMAGED, (b'', b'text', paths[29].read_bytes()[:300])):
        paths[i].write_bytes(data)
    return place


def write_shard(path, files):
    with tarfile.open(path, 'w') as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))



@pytest.fixture(scope='module')
def sources(photos, tmp_path_factory):
    """The same images as sources of every kind: arguments, and the path of each row."""
    pa, pq = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    place, paths = tmp_path_factory.mktemp('sources'), sorted(photos.rglob('[0-9]*.png'))
    names, data = list(map(str, paths)), [path.read_bytes() for path in paths]
    (place / 'list.txt').write_text('\n'.join(['', *names]), encoding='utf-8')
    files = [(f'{i:03}.png', x) for i, x in enumerate(data)]
    extra = [(name, b'') for name in ('000.cls', '._000.png', 'x.json')]
    write_shard(place / '0.tar', extra + files[:15])
    write_shard(place / '1.tar', files[15:] + extra)
    pq.write_table(pa.table(dict(path=names, image=data, label=range(40))), place / 'plain.parquet', row_group_size=17)
    structs = [dict(bytes=None if i == 3 else x, path=names[i] if i in (3, 5) else None) for i, x in enumerate(data)]
    pq.write_table(pa.table(dict(image=structs)), place / 'hf.parquet', row_group_size=9)
    in_shards = [f'{place}/{int(i >= 15)}.tar/{i:03}.png' for i in range(40)]
    in_hf = [names[i] if i in (3, 5) else f'{place}/hf.parquet/{i}' for i in range(40)]
    return dict(
        folder=([photos], names), list=([place / 'list.txt'], names),
        shards=([place / '0.tar', place / '1.tar'], in_shards),
        parquet=([place / 'plain.parquet'], names), hf=([place / 'hf.parquet'], in_hf))
