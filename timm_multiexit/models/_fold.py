"""Folds layers that inference does not need apart: parallel branches of a backbone, and batch normalisation."""
import copy
from typing import Tuple, TypeVar

from timm.layers import ConvNormAct
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

Net = TypeVar('Net', bound=nn.Module)


def merge_branches(model: Net) -> Net:
    """Makes one convolution of the branches with which a backbone was trained (RepVGG, MobileOne, GhostNetV3, ...).

    Returns:
        A copy in eval mode, by timm's `reparameterize_model`; the model itself if it has no such branches, or if they
        cannot be merged, as when an exit follows one of them.
    """
    layers = getattr(model, 'backbone', nn.Identity()).modules()
    if any(hasattr(layer, name) for layer in layers for name in ('fuse', 'reparameterize', 'switch_to_deploy')):
        like = next(model.parameters())
        try:  # some of timm's layers merge in eval mode only, and into layers of float32 on the CPU
            return reparameterize_model(copy.deepcopy(model).eval(), inplace=True).to(like.device, like.dtype)
        except Exception:  # of the backbone's own code; the network runs as it was trained
            pass
    return model


def fold(model: Net) -> Net:
    """Merges branches, and folds every BN that directly follows a convolution into its weight and bias.

    These are the BN of timm's ConvNormAct, and any BN right after a convolution in an nn.Sequential. The BN before a
    convolution (DenseNet) stays, since an activation separates the two.

    Returns:
        A copy in eval mode, whose outputs differ from the original's by rounding only.
    """
    model = copy.deepcopy(merge_branches(model)).eval()
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
