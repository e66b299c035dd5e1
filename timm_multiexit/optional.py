"""What the package needs only for some of its commands, by the name of the extra that installs it."""
import importlib.util
from typing import List

from .errors import InputError

EXTRAS = dict(
    plots=('matplotlib', 'torchmetrics'),
    export=('onnx', 'onnxruntime', 'onnxscript'),
)


def missing_packages(extra: str) -> List[str]:
    """Packages of an extra that are not installed."""
    return [name for name in EXTRAS[extra] if importlib.util.find_spec(name) is None]


def require_extra(extra: str, what: str) -> None:
    """Refuses what cannot work without an extra.

    Args:
        extra: A key of `EXTRAS`.
        what: Who asks, for the message.

    Raises:
        InputError: a package of the extra is not installed.
    """
    missing = missing_packages(extra)
    if missing:
        raise InputError(f"{what} needs {', '.join(missing)}: pip install 'timm-multiexit[{extra}]'")
