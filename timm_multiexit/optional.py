"""Packages that only some commands need, by the extra that installs them."""
import importlib.metadata
import importlib.util
from typing import List

from .errors import InputError

EXTRAS = dict(
    plots=('matplotlib', 'torchmetrics'),
    export=('onnx', 'onnxruntime', 'onnxscript'),
    predict=('onnxruntime', 'pyarrow'),
    ray=('fastapi', 'onnxruntime', 'prometheus_client', 'pyarrow', 'python_multipart', 'ray', 'uvicorn'),
    serve=('fastapi', 'onnxruntime', 'prometheus_client', 'python_multipart', 'uvicorn'),
)


def missing_packages(extra: str) -> List[str]:
    """Packages of an extra that are not installed, by import name."""
    return [name for name in EXTRAS[extra] if importlib.util.find_spec(name) is None]


def require_extra(extra: str, what: str) -> None:
    """Checks that the packages of an extra are installed.

    Args:
        extra: A key of `EXTRAS`.
        what: The command or feature that needs them, for the error message.

    Raises:
        InputError: a package of the extra is not installed.
    """
    missing = missing_packages(extra)
    if missing:
        raise InputError(f"{what} needs {', '.join(missing)}: pip install 'timm-multiexit[{extra}]'")


def require_timm(minimum: str, what: str) -> None:
    """Refuses what needs a newer timm than inference does.

    Args:
        minimum: Version 'X.Y.Z'.
        what: What needs it, for the message.

    Raises:
        InputError: the installed timm is older.
    """
    installed = importlib.metadata.version('timm')
    if [int(part) for part in installed.split('.')[:3]] < [int(part) for part in minimum.split('.')]:
        raise InputError(f"{what} needs timm {minimum} or newer, not {installed}: pip install 'timm>={minimum}'")
