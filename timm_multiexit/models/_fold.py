"""Batch normalization folded into the convolutions before it, for inference."""
import copy
from typing import Tuple

from timm.layers import ConvNormAct
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """A copy in eval mode in which no BN follows a convolution: its scale and shift are the convolution's own.

    Folded are timm's ConvNormAct and a BN that stands right behind a convolution in an nn.Sequential. A BN that
    comes before its convolution, behind which an activation stands (DenseNet), stays. What the copy computes differs
    from the original by rounding only.
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
    """The convolution with the BN in it, and what is left of the BN: the activation of timm's BatchNormAct2d."""
    return fuse_conv_bn_eval(conv, norm), getattr(norm, 'act', nn.Identity())
