"""The architectures. Importing this package registers every one of them in timm's model registry."""
from .base import ExitHead, MultiExitNet, Stage
from .msdnet import MSDNet
from .msfuse import MSFuse

__all__ = ['ExitHead', 'MSDNet', 'MSFuse', 'MultiExitNet', 'Stage']
