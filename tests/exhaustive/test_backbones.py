"""Exits on every model class of the installed timm, on one small member each; backbones.md is the table of it:

    python -m pytest -m exhaustive tests/exhaustive/test_backbones.py --results tests/exhaustive/backbones.md

Weights and BN statistics are drawn at random first: an untrained network hardly looks at its image. In double
precision, where the model's own code allows it: random weights amplify the rounding of a batch of another size.
"""
import copy
import sys
import warnings

import pytest
import timm
import torch
from backbone_support import difference, enliven, exits_with_drops, photos
from conftest import exit_logits

from timm_multiexit import InputError, add_exits
from timm_multiexit.inference.onnx_engine import OnnxEngine
from timm_multiexit.pretrained.hub_files import first_line

VIT = dict(embed_dim=96, depth=6, num_heads=3)
# Size of the images, members, and arguments that make them small. Images of less than the own size need no argument.
MEMBERS = [
    (64, 'cpubone_nano convmixer_768_32 convnext_atto cs3darknet_focus_s cspnext_tiny csatv2 davit_tiny '
         'densenet121 dla46_c dpn48b edgenext_xx_small efficientnet_lite0 efficientvim_m1 efficientvim_m1_dist '
         'efficientvit_b0 efficientvit_l1 efficientvit_m0 ese_vovnet19b_slim_dw fasternet_t0 fastvit_t8 '
         'focalnet_tiny_srf ghostnet_050 hgnetv2_b0 hieradet_small hrnet_w18_small inception_next_atto '
         'lcnetv2_small legacy_seresnet18 lowformer_b0 mambaout_femto mobilenetv3_small_050 mobileone_s0 '
         'nextvit_small nf_regnet_b0 poolformer_s12 pvt_v2_b0 rdnet_tiny regnetx_002 repghostnet_050 '
         'repvit_m0_9 resnet10t resnetv2_18 rexnet_100 selecsls42 shvit_s1 starnet_s050 tiny_vit_5m_224 '
         'tresnet_m vgg11 xception41 xception41p legacy_xception', {}),
    (64, 'nasnetalarge pnasnet5large', dict(num_classes=10)),
    (96, 'inception_resnet_v2 inception_v3 inception_v4', {}),
    (64, 'coat_tiny coatnet_pico_rw_224 convit_tiny deit_tiny_distilled_patch16_224 efficientformerv2_s0 '
         'eva02_tiny_patch14_224 gcvit_xxtiny hiera_tiny_224 levit_128s levit_256d mixer_s32_224 '
         'mobilevit_xxs mvitv2_tiny nest_tiny pit_ti_224 pit_ti_distilled_224 sequencer2d_s swiftformer_xs '
         'swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 '
         'tnt_s_patch16_224 tnt_s_legacy_patch16_224 twins_svt_small twins_pcpvt_small visformer_tiny '
         'vit_tiny_patch16_224 vit_relpos_small_patch16_224 volo_d1_224 xcit_nano_12_p16_224', dict(img_size=64)),
    (64, 'cait_xxs24_224', dict(img_size=64, depth=6)),
    (64, 'beit_base_patch16_224 naflexvit_base_patch16_gap samvit_base_patch16_224 qwen3_vit_88m qwen3_vit_88m_enc',
     dict(img_size=64, **VIT)),
    (96, 'gemma4_vit_167m gemma4_vit_167m_enc', dict(img_size=96, **VIT)),
    (84, 'deepseek_vit_412m deepseek_vit_412m_enc', dict(img_size=84, **VIT)),
    (64, 'mobilenetv5_300m mobilenetv5_300m_enc', dict(channel_multiplier=0.25)),
    (128, 'iformer_t', {}),
    (120, 'crossvit_tiny_240', dict(img_size=120)),
    (224, 'efficientformer_l1', {}),
]
CASES = {name: (size, kwargs) for size, names, kwargs in MEMBERS for name in names.split()}
# Which cannot be cut, and why: nothing may be cut wrongly.
REFUSED = dict(
    gemma4_vit_167m='control flow', **dict.fromkeys(
        ('gemma4_vit_167m_enc', 'qwen3_vit_88m_enc', 'deepseek_vit_412m_enc', 'mobilenetv5_300m_enc'),
        'is an encoder without a classifier'))
TIME = '10 minutes of CPU time for all'


class _Built(Exception):
    """Of a model: its class."""


@pytest.fixture
def class_of(monkeypatch):
    """The class of a model's name, without building the model."""
    def ask(model_cls, *args, **kwargs):
        raise _Built(model_cls)
    for name, module in list(sys.modules.items()):
        if name.startswith('timm.models.') and hasattr(module, 'build_model_with_cfg'):
            monkeypatch.setattr(module, 'build_model_with_cfg', ask)

    def class_of(name):
        with pytest.raises(_Built) as built:
            timm.models.model_entrypoint(name)(pretrained=False)
        return built.value.args[0]
    return class_of


@pytest.mark.exhaustive(TIME)
def test_every_class_has_a_member(class_of, record_property):
    theirs = [name for name in timm.list_models() if timm.models.model_entrypoint(name).__module__.startswith('timm.')]
    classes = {class_of(name) for name in theirs}
    assert {cls.__name__ for cls in classes - {class_of(name) for name in CASES}} == set()
    record_property('measured', f'{len(classes)} classes, {len(CASES)} members')


def build(name):
    """The plain model, the same with exits, and the size of images; the model alone if exits are refused."""
    size, kwargs = CASES[name]
    size = (3, size, size)
    model = timm.create_model(name, **kwargs)
    model.pretrained_cfg = dict(model.pretrained_cfg, input_size=size)  # for which it is cut
    if is_refused(name, model):
        return model, None, size
    net = enliven(add_exits(copy.deepcopy(model)), size)
    model.load_state_dict(net.backbone.state_dict())
    return model.eval(), net, size


def is_refused(name, model):
    """Whether exits cannot be added, as is known of it, with a message of one line."""
    if name not in REFUSED:
        return ''
    with pytest.raises(InputError, match=REFUSED[name]) as caught:
        add_exits(model)
    assert '\n' not in str(caught.value)
    return str(caught.value)


def precision(model, x):
    """Double, and the largest difference that rounding makes; float32 for models that cast to it on their way."""
    try:
        copy.deepcopy(model).double()(x.double())
        return torch.float64, 1e-9
    except RuntimeError:
        return torch.float32, 1e-2


@torch.no_grad()
def scripted(model):
    """The model for TorchScript, None if that does not compile it."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            return torch.jit.script(model)
        except Exception:  # of many types
            return None


@pytest.mark.exhaustive(TIME)
@pytest.mark.parametrize('name', CASES)
@torch.no_grad()
def test_exits_on(name, record_property):
    """The last exit is the model's own, images can be dropped, train mode is the model's, TorchScript gives the same"""
    model, net, size = build(name)
    if net is None:
        record_property('measured', f'{type(model).__name__} is refused: {is_refused(name, model)}')
        return
    x = photos(4, size)
    dtype, bound = precision(model, x)
    model, net, x = model.to(dtype), net.to(dtype), x.to(dtype)
    assert net.num_exits == 4
    whole = model(x)
    equal = difference(net(x), whole)
    alone = [*map(torch.cat, zip(*(net.forward_exits(image[None]) for image in x)))][:-1]
    alone.append(torch.cat([model(image[None]) for image in x]))
    dropped = max(difference(own.index_copy(0, left, logits), own)
                  for own, (left, logits) in zip(alone, exits_with_drops(net, x)))
    assert equal < bound and dropped < bound
    script = scripted(net)
    if script is not None:
        assert difference(script(x), whole) < bound
    assert script is not None or scripted(model) is None
    outputs = []
    for each in (model, net):
        torch.manual_seed(1)
        each.train()
        own = each(x) if each is model else each.forward_head(each.forward_features(x))
        outputs.append(own[0] if isinstance(own, tuple) else own)
        each.eval()
    trained = difference(*outputs)
    assert trained < bound
    state = [x]
    live = [len(state := stage(state)) for stage in net.stages][:-1]
    record_property('measured', (
        f"{type(model).__name__}, after {', '.join(net.taps)}: {' '.join(map(str, live))} tensors live, "
        f'{str(dtype).removeprefix("torch.")}, difference {equal:.0e}, images dropped {dropped:.0e}, train mode '
        f"{trained:.0e}{'' if script is not None else ', not scripted, nor is the model'}"))


@pytest.mark.exhaustive('half an hour of CPU time for all: exports')
@pytest.mark.parametrize('name', CASES)
@torch.no_grad()
def test_onnx_segments_of(name, record_property):
    """Run one after the other, as an engine does; what the exporter cannot write is told in its words."""
    model, net, _ = build(name)
    if net is None:
        return
    x = photos(4, net.image_size)
    try:
        engine = OnnxEngine(net)
    except Exception as error:  # of many types
        while error.__cause__:  # the exporter's own says which of its steps failed, and not why
            error = error.__cause__
        record_property('measured', f'not exported: {type(error).__name__}: {first_line(error)[:150]}')
        return
    ours, theirs = exit_logits(engine, x), net.forward_exits(x)
    differences = [difference(a, b) for a, b in zip(ours, theirs)]
    dtype, _ = precision(model, x)
    exact = net.to(dtype).forward_exits(x.to(dtype))
    rounding = max(difference(a, b.float()) for a, b in zip(theirs, exact))
    record_property('measured', f"{type(model).__name__}, differences {' '.join(f'{d:.0e}' for d in differences)}"
                                f', rounding alone {rounding:.0e}')
    assert max(differences) < max(1e-2, 10 * rounding)
