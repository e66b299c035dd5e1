"""The architectures. Importing this package registers them in timm's model registry."""
from ._base import ExitHead, MultiExitNet, Stage
from ._costs import exit_costs
from .backbone import MultiExitBackbone, add_exits
from .densenet_mc import DenseNetMC
from .msdnet import MSDNet
from .msfuse import MSFuse
from .ranet import RANet
from .resnet_mc import ResNetMC
from .vgg_mc import VGGMC

__all__ = [
    'DenseNetMC', 'ExitHead', 'MSDNet', 'MSFuse', 'MultiExitBackbone', 'MultiExitNet', 'RANet', 'ResNetMC', 'Stage',
    'VGGMC', 'add_exits', 'exit_costs']
