"""Names that only tests register: timm's suite runs over a CNN, a vision transformer and a hybrid with exits."""
import timm
from timm.models import generate_default_cfgs, register_model

from timm_multiexit.models.backbone import multiexit

BACKBONES = dict(cnn_multiexit='resnet10t', vit_multiexit='vit_tiny_patch16_224', hybrid_multiexit='mobilevit_xxs')


def _cfg(backbone):
    own = timm.get_pretrained_cfg(backbone, allow_unregistered=False).to_dict(remove_source=True)
    names = [f'exits.{k}.fc' for k in range(3)] + [f"backbone.{own['classifier']}"]
    own.pop('tag', None)
    return dict(own, first_conv=f"backbone.{own['first_conv']}", classifier=tuple(names), architecture=None)


default_cfgs = generate_default_cfgs({name: _cfg(backbone) for name, backbone in BACKBONES.items()})


@register_model
def cnn_multiexit(pretrained=False, **kwargs):
    return multiexit(pretrained, **dict(kwargs, backbone=BACKBONES['cnn_multiexit']))


@register_model
def vit_multiexit(pretrained=False, **kwargs):
    return multiexit(pretrained, **dict(kwargs, backbone=BACKBONES['vit_multiexit']))


@register_model
def hybrid_multiexit(pretrained=False, **kwargs):
    return multiexit(pretrained, **dict(kwargs, backbone=BACKBONES['hybrid_multiexit']))
