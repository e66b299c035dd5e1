"""Multi-exit image classifiers for timm: importing this package registers them in timm's model registry."""
from . import models as _models  # noqa: F401 - registers the architectures

__version__ = '0.1.0'
