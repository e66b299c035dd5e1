"""Folds batch normalisation into the preceding convolutions, for inference."""
import copy
from typing import Tuple, TypeVar

from timm.layers import ConvNormAct
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

Net = TypeVar('Net', bound=nn.Module)


def fold_batch_norm(model: Net) -> Net:
    """Folds every BN that directly follows a convolution into its weight and bias.

    These are the BN of timm's ConvNormAct, and any BN right after a convolution in an nn.Sequential. The BN before a
    convolution (DenseNet) stays, since an activation separates the two.

    Returns:
        A copy in eval mode, whose outputs differ from the original's by rounding only.
    """
    model = copy.deepcopy(model).eval()
    for module in list(model.modules()):
        if isinstance(module, ConvNormAct):
            if isinstance(module.bn, nn.BatchNorm2d):
                module.conv, module.bn = _fold(module.conv, module.bn)
        elif isinstance(module, nn.Sequential):
            names = list(module._modules)
            for first, second in zip(names[:-1], names[1:]):
                conv, norm = module._modules[first], module._modules[second]
                if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    module._modules[first], module._modules[second] = _fold(conv, norm)
    return model


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tuple[nn.Conv2d, nn.Module]:
    """The folded convolution, and what is left of the BN: the activation of timm's BatchNormAct2d."""
    return fuse_conv_bn_eval(conv, norm), getattr(norm, 'act', nn.Identity())
