"""Atomic writes, and readers whose errors name the file.

A file is written under another name in its folder and renamed: an interruption leaves the old one or the new one.
"""
import csv
import hashlib
import json
import os
import shutil
import socket
import stat
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence, Tuple, Union

from .errors import InputError, first_line

try:
    import fcntl
except ImportError:  # Windows: processes are not guarded against each other
    fcntl = None


@contextmanager
def written_beside(path: Union[str, Path]) -> Iterator[Path]:
    """A temporary path to write to; if the block ends without an error, its file replaces the one at `path`.

    A link is followed and the mode of an existing file kept. A pipe or device is written to, not replaced. Missing
    folders are created.

    Raises:
        InputError: `path` cannot be written, or the disk is full. What stood there stands.
    """
    path = Path(path)
    with _write_errors(path):
        if _is_stream(path):
            with tempfile.TemporaryDirectory() as folder:
                partial = Path(folder) / path.name
                yield partial
                with partial.open('rb') as source, path.open('wb') as target:
                    shutil.copyfileobj(source, target)
            return
        path, partial = _places(path)
        try:
            yield partial
            with partial.open('rb+') as file:  # after a power cut the name must not be there without the content
                os.fsync(file.fileno())
            if path.exists():
                partial.chmod(stat.S_IMODE(path.stat().st_mode))
            os.replace(partial, path)
        except BaseException:
            with suppress(OSError):  # never written
                partial.unlink()
            raise


@contextmanager
def replaced(folder: Union[str, Path], mark: str) -> Iterator[Path]:
    """A new folder to fill; if the block ends without an error, it replaces the one at `folder`.

    Args:
        folder: Its place.
        mark: A file that an earlier folder of this kind holds.

    Raises:
        InputError: the place holds something else, is a mount point, or cannot be written.
    """
    folder = Path(folder).resolve()
    if os.path.ismount(folder):
        raise InputError(f"'{folder}' is a mount point, which cannot be replaced: give a folder in it")
    if folder.exists() and not (folder / mark).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"'{folder}' holds something other than an earlier export: give another folder")
    with _write_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f'.{folder.name}-') as scratch:
            made = Path(scratch) / 'made'
            made.mkdir()
            yield made
            if folder.exists():
                folder.rename(Path(scratch) / 'before')
            made.rename(folder)


def require_writable(path: Union[str, Path]) -> None:
    """Checks that `written_beside` can write here, for commands to call before their work.

    Raises:
        InputError: it cannot.
    """
    path = Path(path)
    with _write_errors(path):
        if path.is_dir():
            raise OSError('it is a folder')
        if _is_stream(path):
            if not os.access(path, os.W_OK):
                raise OSError('no permission')
        else:
            _, partial = _places(path)
            partial.touch()
            partial.unlink()


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a folder; the kernel lets them in again however this one ends.

    Raises:
        InputError: another process holds it, or it cannot be written.
    """
    path = folder / '.lock'
    require_writable(path)
    with path.open('a+') as file:
        try:
            if fcntl:  # not flock: that would live on in the loader's workers
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise InputError(f"'{folder}' is in use by {file.read() or error}: wait for it, stop it, or choose another "
                             'folder') from error
        with _write_errors(path):  # unbuffered, or closing the file would fail once more on a full disk
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f'process {os.getpid()} on {socket.gethostname()}'.encode())
        for partial in folder.glob('.*.[0-9]*'):  # of a run that was killed, see `_places`
            if partial.is_file():
                partial.unlink()
        yield


def _is_stream(path: Path) -> bool:
    return path.exists() and not path.is_file() and not path.is_dir()


def _places(path: Path) -> Tuple[Path, Path]:
    """The file itself, with links followed, and a name beside it; their folder is created."""
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    # With the same suffix: Matplotlib chooses the format by it. Shortened: a long name is still a valid one.
    return path, path.with_name(f'.{path.stem[:64]}.{os.getpid()}{path.suffix}')


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"'{path}' cannot be written ({error.strerror or error}): choose another place or free "
                         'space') from error


def write_json(path: Union[str, Path], content: Any) -> None:
    """Writes JSON indented by two spaces, values that fit on one line of 120 columns unbroken."""
    with written_beside(path) as partial:
        partial.write_text(_format(content) + '\n', encoding='utf-8')


def write_csv(path: Union[str, Path], rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows, beside and renamed, under a header of all their keys in the order in which they first occur."""
    with written_beside(path) as partial, partial.open('w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)


def _format(value: Any, indent: str = '') -> str:
    flat = json.dumps(value, allow_nan=False, ensure_ascii=False)
    if len(indent) + len(flat) <= 118 or not isinstance(value, (dict, list, tuple)):
        return flat
    inner = indent + '  '
    if isinstance(value, dict):
        rows = [f'{inner}{json.dumps(str(k))}: {_format(v, inner)}' for k, v in value.items()]
        return '{\n' + ',\n'.join(rows) + f'\n{indent}}}'
    return '[\n' + ',\n'.join(inner + _format(v, inner) for v in value) + f'\n{indent}]'


def read_json(path: Union[str, Path], what: str) -> Any:
    """Reads JSON.

    Args:
        path: The file.
        what: What the file is, for the error message.

    Raises:
        InputError: the file is missing, cannot be read, or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, 'strerror', None) or first_line(error)
        raise InputError(f"{what} '{path}' cannot be read ({reason}): check the name and the file") from error


def read_yaml(path: Union[str, Path], what: str) -> Any:
    """Reads YAML.

    Args:
        path: The file.
        what: What the file is, for the error message.

    Raises:
        InputError: the file is missing, cannot be read, or is not YAML.
    """
    import yaml  # not on top: devices run `stopping` without it
    try:
        return yaml.safe_load(Path(path).read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{what} '{path}' cannot be read ({first_line(error)}): check the file") from error


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
