"""Where millions of images come from, one at a time in a fixed order: folders, lists, shards of WebDataset, Parquet."""
import hashlib
import itertools
import os
import sys
import tarfile
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Protocol, Sequence, Union

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import InputError, first_line
from .images import SUFFIXES, is_hidden, walk_images

_ROWS = 16  # of a Parquet file that are read at once


class Item(NamedTuple):
    """An image: its path in the answers, and where it is, or why it is not."""

    path: str
    image: Union[Path, BytesIO, InputError]


class ImageSource(Protocol):
    """Images in a fixed order.

    Attributes:
        images: How many there are, None where only reading tells.
        record: Values by which a rerun knows the source again.
    """

    images: Optional[int]
    record: Dict[str, Any]

    def read(self, skip: int) -> Iterator[Optional[Item]]:
        """All images in order; None in place of the first `skip`, which are not read.

        Raises:
            InputError: it cannot be read any more, or has changed.
        """
        ...


class Files:
    """The image files of a folder with its subfolders, or those that a text file names, one a line."""

    def __init__(self, place: str):
        self.place, images, digest, relative = Path(place), 0, hashlib.sha256(), False
        for path in self._paths():
            images += 1
            relative = relative or not os.path.isabs(path)
            digest.update(os.fsencode(path) + b'\n')
        if not images:
            advice = f"{', '.join(sorted(SUFFIXES))} files" if self.place.is_dir() else 'one path per line'
            raise InputError(f"'{place}' holds no images: give {advice}")
        self.images: Optional[int] = images
        self.record: Dict[str, Any] = dict(source=place, images=images, sha256=digest.hexdigest())
        if relative and not self.place.is_dir():
            self.record['relative_to'] = os.getcwd()

    def _paths(self) -> Iterator[str]:
        if self.place.is_dir():
            yield from map(str, walk_images(self.place))
            return
        with self.place.open(encoding='utf-8-sig', errors='surrogateescape') as lines:
            yield from filter(None, (line.strip('\r\n') for line in lines))

    def read(self, skip: int) -> Iterator[Optional[Item]]:
        digest = hashlib.sha256()
        for number, path in enumerate(self._paths()):
            digest.update(os.fsencode(path) + b'\n')
            yield None if number < skip else Item(path, Path(path))
        if digest.hexdigest() != self.record['sha256']:
            raise InputError(f"'{self.place}' names other images than at the start: predict again, to another --output")


class Shard:
    """The images of a .tar file, as WebDataset has them, in its order; one that is cut short ends in an error."""

    def __init__(self, place: str):
        self.images: Optional[int] = None
        try:
            tarfile.open(place, 'r:').close()
        except (tarfile.TarError, EOFError):
            raise InputError(f"'{place}' is not an uncompressed tar file, or its beginning is damaged: give another"
                             ) from None
        self.place = place
        self.record: Dict[str, Any] = dict(source=place, bytes=os.path.getsize(place))

    def read(self, skip: int) -> Iterator[Optional[Item]]:
        seen = 0
        try:
            with tarfile.open(self.place, 'r:') as tar:
                while member := tar.next():
                    tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue] - it would keep them all
                    name = PurePosixPath(member.name)
                    hidden = any(is_hidden(part) for part in name.parts if part != '..')
                    if member.isfile() and name.suffix.lower() in SUFFIXES and not hidden:
                        seen += 1
                        yield None if seen <= skip else Item(f'{self.place}/{member.name}', _data(tar, member))
                assert tar.fileobj is not None
                tar.fileobj.seek(tar.offset)  # a damaged header ends the loop as the end does
                if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                    raise tarfile.ReadError('a header is damaged, or the end is missing')
        except tarfile.TarError as error:
            yield None if seen < skip else Item(
                self.place, InputError(f'what follows in this shard cannot be read ({error}): make it again'))


def _data(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Union[BytesIO, InputError]:
    try:
        file = tar.extractfile(member)
        assert file is not None
        return BytesIO(file.read())
    except tarfile.TarError as error:  # then `next` raises it too
        return InputError(f'the shard is cut short here ({error}): make it again')


class Table:
    """The rows of a Parquet file: `image`, bytes or Hugging Face's {bytes, path}, and `path` if there is one."""

    def __init__(self, place: str):
        self.place = place
        try:
            with pq.ParquetFile(place) as file:
                schema, images = file.schema_arrow, file.metadata.num_rows
        except pa.ArrowException as error:
            raise InputError(f"'{place}' is not a Parquet file ({first_line(error)}): give another") from error
        kind = schema.field('image').type if 'image' in schema.names else None
        if kind is not None and pa.types.is_struct(kind):
            fields = {kind.field(k).name: kind.field(k).type for k in range(kind.num_fields)}
            kind = fields.get('bytes')
        if kind is None or not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            raise InputError(f"'{place}' has no column 'image' of bytes, its columns are {', '.join(schema.names)}: "
                             'rename the one with the images')
        self.columns = [name for name in ('image', 'path') if name in schema.names]
        self.images: Optional[int] = images
        self.record: Dict[str, Any] = dict(source=place, images=images, bytes=os.path.getsize(place))

    def read(self, skip: int) -> Iterator[Optional[Item]]:
        # By default a row group is read as a whole.
        with pq.ParquetFile(self.place, buffer_size=1 << 20, pre_buffer=False) as file:
            end = 0
            for group in range(file.num_row_groups):
                row, end = end, end + file.metadata.row_group(group).num_rows
                if end <= skip:
                    yield from itertools.repeat(None, end - row)
                    continue
                batches = file.iter_batches(_ROWS, [group], self.columns, use_threads=False)
                while row < end:
                    try:
                        values = next(batches).to_pylist()
                    except (pa.ArrowException, OSError) as error:
                        if getattr(error, 'errno', None):  # of the disk, not of the file
                            raise
                        reason = InputError(f'the row cannot be read ({first_line(error)}): write it again')
                        values = [dict(image=reason)] * (end - row)
                    for value in values:
                        yield None if row < skip else self._item(row, **value)
                        row += 1

    def _item(self, row: int, image: Any, path: Any = None) -> Item:
        if isinstance(image, dict):
            path = path or image.get('path')
            data, place = image['bytes'], image.get('path')
            image = Path(place) if data is None and place else data
        if image is None:
            image = InputError('the row has no image')
        return Item(str(path or f'{self.place}/{row}'), BytesIO(image) if isinstance(image, bytes) else image)


KINDS = {'.txt': Files, '.tar': Shard, '.parquet': Table}


def open_sources(places: Sequence[str]) -> List[ImageSource]:
    """Folders, lists of paths (.txt), shards (.tar) and Parquet files, which are read one after the other.

    Raises:
        InputError: one is missing, of another kind, or holds no images as far as that can be told.
    """
    sources: List[ImageSource] = []
    for place in places:
        if not Path(place).exists():
            raise InputError(f"'{place}' does not exist: check the name")
        kind = Files if Path(place).is_dir() else KINDS.get(Path(place).suffix.lower())
        if kind is None:
            raise InputError(f"'{place}' is not a source of images: give a folder, a list of paths (.txt), .tar shards "
                             'or .parquet files')
        try:
            sources.append(kind(place))
        except OSError as error:
            raise InputError(f"'{place}' cannot be read ({error.strerror or error}): check the name") from error
    return sources


def read_images(sources: Sequence[ImageSource], skip: int) -> Iterator[Item]:
    """The images of all sources but the first `skip`.

    Raises:
        InputError: a source has changed, or cannot be read any more.
    """
    seen = 0
    for source in sources:
        if source.images is not None and seen + source.images <= skip:
            seen += source.images
            continue
        with _readable(source):
            for item in source.read(skip - seen):
                seen += 1
                if item is not None:
                    yield item


def count_images(sources: Sequence[ImageSource]) -> int:
    """How many images all sources hold; those that only reading tells are told of theirs.

    Raises:
        InputError: as `read_images`.
    """
    for source in sources:
        with _readable(source):
            source.images = sum(1 for _ in source.read(sys.maxsize))
    return sum(source.images or 0 for source in sources)


@contextmanager
def _readable(source: ImageSource) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"'{source.record['source']}' cannot be read any more ({error.strerror or error}): run "
                         'the same command once it can') from error
