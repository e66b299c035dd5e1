"""The architectures. Importing this package registers every one of them in timm's model registry."""
from .base import ExitHead, MultiExitNet, Stage
from .msfuse import MSFuse

__all__ = ['ExitHead', 'MSFuse', 'MultiExitNet', 'Stage']
