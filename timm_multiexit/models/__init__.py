"""The architectures. Importing this package registers them in timm's model registry."""
from ._base import ExitHead, MultiExitNet, Stage
from ._costs import exit_costs
from .densenet_mc import DenseNetMC
from .msdnet import MSDNet
from .msfuse import MSFuse
from .ranet import RANet
from .resnet_mc import ResNetMC
from .vgg_mc import VGGMC

__all__ = [
    'DenseNetMC', 'ExitHead', 'MSDNet', 'MSFuse', 'MultiExitNet', 'RANet', 'ResNetMC', 'Stage', 'VGGMC', 'exit_costs']
