"""Atomic writes, and readers whose errors name the file.

A file is written under another name in its folder and renamed: an interruption leaves the old one or the new one.
"""
import hashlib
import json
import os
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Iterator, Union

from .errors import InputError


@contextmanager
def written_beside(path: Union[str, Path]) -> Iterator[Path]:
    """A temporary path to write to, in the folder of `path`, which it replaces if the block ends without an error.

    Missing folders are created.

    Raises:
        InputError: the folder cannot be created or written to.
    """
    path = Path(path)
    # With the same suffix: Matplotlib chooses the format by it.
    partial = path.with_name(f'.{path.stem}.{os.getpid()}{path.suffix}')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"'{path}' cannot be written ({error.strerror or error}): choose another place") from error
    finally:
        with suppress(OSError):  # already renamed, or never written
            partial.unlink()


def write_json(path: Union[str, Path], content: Any) -> None:
    """Writes JSON indented by two spaces, values that fit on one line of 120 columns unbroken."""
    with written_beside(path) as partial:
        partial.write_text(_format(content) + '\n', encoding='utf-8')


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
    except (OSError, ValueError) as error:
        reason = getattr(error, 'strerror', None) or str(error).splitlines()[0]
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
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{what} '{path}' cannot be read ({str(error).splitlines()[0]}): check the file") from error


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
