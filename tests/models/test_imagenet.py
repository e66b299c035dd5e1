"""The networks for ImageNet: the costs of the papers' code, and its checkpoints."""
import pytest
import timm
import torch

from timm_multiexit import InputError, exit_costs, load_model
from timm_multiexit.models._public import checkpoint_filter_fn

# Counted on the public code: multiply-adds of convolutions and linear layers in millions, and parameters.
PUBLISHED = dict(
    msdnet_imagenet_s4=('337.21 681.65 1003.66 1249.63 1355.61', 23_958_440),
    msdnet_imagenet_s6=('511.32 1166.14 1838.35 2494.63 2735.13', 56_529_304),
    msdnet_imagenet_s7=('612.03 1430.81 2276.39 2959.94 3246.18', 62_314_472),
    ranet_imagenet=('244.97 629.50 858.40 1039.08 1866.36 2156.83 2728.62 2822.62', 131_123_991),
)
STEM_BIAS = 32 * 112 * 112  # ptflops counts the additions of a bias


@pytest.mark.parametrize('name', [
    'msdnet_imagenet_s4',
    *(pytest.param(n, marks=pytest.mark.slow('20 s each: large networks at 224 pixels'))
      for n in PUBLISHED if n != 'msdnet_imagenet_s4')])
def test_costs_are_those_of_the_public_code(name):
    macs, params = PUBLISHED[name]
    costs = exit_costs(timm.create_model(name))
    assert [round((m - STEM_BIAS) / 1e6, 2) for m in costs.macs] == pytest.approx(
        list(map(float, macs.split())), abs=0.011)
    assert costs.params[-1] == params and costs.input_size == (3, 224, 224)


def public_state(net, prefix=''):
    """The weights of a network under names as in the public code, in its order: the exits' linear layer comes last."""
    own = {k: v for k, v in net.state_dict().items() if not k.endswith('num_batches_tracked')}
    ranet = type(net).__name__ == 'RANet'
    state, last = {}, {}
    for i, (name, value) in enumerate((k, v) for k, v in own.items() if k.startswith('stages.')):
        stem = name.startswith('stages.0.layers.0.')
        group = ('FirstLayer.layers' if stem else 'scale_flows.0.0.layers') if ranet else f'blocks.{0 if stem else 1}.0'
        (state if not (ranet and stem) else last)[f'{prefix}{group}.{i:05d}.weight'] = value
    for k in range(net.num_exits):
        names = [n for n in own if n.startswith(f'exits.{k}.')]
        for i, n in enumerate(n for n in names if '.fc.' not in n):
            state[f'{prefix}classifier.{k}.m.{i:03d}'] = own[n]
        state[f'{prefix}classifier.{k}.linear.weight'] = own[f'exits.{k}.fc.weight']
        state[f'{prefix}classifier.{k}.linear.bias'] = own[f'exits.{k}.fc.bias']
    return {**state, **last}  # RANet's first layer was registered last


SMALL = dict(
    msdnet_imagenet_s4=dict(steps=(1, 2), base_width=8, growth=4, num_classes=10),
    ranet_imagenet=dict(scales=(1, 2), block_layers=(2,) * 4, base_width=8, growth=8, width_factors=(2, 1),
                        num_classes=10),
)


@pytest.mark.parametrize('prefix', ['', 'module.'])
@pytest.mark.parametrize('name', SMALL)
def test_checkpoints_of_the_public_code(name, prefix, tmp_path):
    net = timm.create_model(name, **SMALL[name]).eval()
    torch.save(dict(state_dict=public_state(net, prefix), epoch=89), tmp_path / 'checkpoint.pth.tar')
    back = load_model(name, tmp_path / 'checkpoint.pth.tar', **SMALL[name])
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(net.forward_exits(x), back.forward_exits(x)))


def test_other_configurations_are_told_apart():
    net = timm.create_model('ranet_imagenet', **SMALL['ranet_imagenet'])
    other = timm.create_model('ranet_imagenet', **{**SMALL['ranet_imagenet'], 'base_width': 4, 'num_classes': 7})
    with pytest.raises(InputError) as caught:
        checkpoint_filter_fn(public_state(other), net)
    assert 'num_classes 7, here 10' in str(caught.value)
    assert 'channels of the first maps (base_width times its factors) [4, 8], here [8, 16]' in str(caught.value)
    deeper = timm.create_model('ranet_imagenet', **{**SMALL['ranet_imagenet'], 'growth': 16})
    with pytest.raises(InputError, match=r'growth, factors'):
        checkpoint_filter_fn(public_state(deeper), net)
    with pytest.raises(InputError, match='are of the public MSDNet: RANet reads its own'):
        checkpoint_filter_fn(public_state(timm.create_model('msdnet_imagenet_s4', **SMALL['msdnet_imagenet_s4'])), net)
    with pytest.raises(InputError, match="have keys like 'conv1.weight'"):
        checkpoint_filter_fn({'conv1.weight': torch.zeros(1)}, net)


@pytest.mark.parametrize('name', SMALL)
def test_a_transformer_s_blocks_are_not_those_of_the_public_code(name, tmp_path):
    vit = timm.create_model('vit_tiny_patch16_224', depth=1, embed_dim=24, num_heads=3)
    torch.save(vit.state_dict(), tmp_path / 'vit.pth')
    with pytest.raises(InputError, match="have keys like 'cls_token': "):
        load_model(name, tmp_path / 'vit.pth', **SMALL[name])
