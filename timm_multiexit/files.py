"""Files written beside and renamed, so that an interruption leaves the old file or the new one, never half of one."""
import json
import os
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Iterator, Union

from .errors import InputError


@contextmanager
def written_beside(path: Union[str, Path]) -> Iterator[Path]:
    """A path in the same folder to write to; it takes the place of `path` when the block ends without an error.

    The suffix is kept, since writers of figures choose their format by it. Missing folders are made.

    Raises:
        InputError: the folder cannot be made or written to.
    """
    path = Path(path)
    partial = path.with_name(f'.{path.stem}.{os.getpid()}{path.suffix}')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"'{path}' cannot be written ({error.strerror or error}): choose another place") from error
    finally:
        with suppress(OSError):  # renamed, or never made
            partial.unlink()


def write_json(path: Union[str, Path], content: Any) -> None:
    """Writes JSON with one indented line per entry of the outer levels and short lists on one line."""
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
        what: What it should hold, for the error.

    Raises:
        InputError: it is not there, cannot be read, or is not JSON.
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
        what: What it should hold, for the error.

    Raises:
        InputError: it is not there, cannot be read, or is not YAML.
    """
    import yaml  # stopping rules need this module, and run where YAML may be missing
    try:
        return yaml.safe_load(Path(path).read_text(encoding='utf-8'))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{what} '{path}' cannot be read ({str(error).splitlines()[0]}): check the file") from error
