"""ResNet^MC, DenseNet^MC and VGG^MC: layers, exits and costs."""
import pytest
import timm
import torch
from torch import nn

from timm_multiexit.models._costs import exit_costs
from timm_multiexit.models.densenet_mc import DenseLayer, Transition
from timm_multiexit.models.resnet_mc import BasicBlock

NAMES = ('resnet62_mc_cifar', 'densenet52_mc_cifar', 'vgg8_mc_cifar')


@pytest.mark.parametrize('name,macs', [(NAMES[0], 135e6), (NAMES[1], 131e6)])
def test_the_last_exit_costs_what_the_figures_show(name, macs):
    assert exit_costs(timm.create_model(name)).macs[-1] == pytest.approx(macs, rel=0.02)


@pytest.mark.parametrize('name,kwargs,layers', [
    (NAMES[0], {}, 62), (NAMES[1], {}, 52), (NAMES[2], {}, 8), (NAMES[2], dict(depth=3), 11)])
def test_number_of_layers(name, kwargs, layers):
    model = timm.create_model(name, **kwargs)
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) + 1 == layers  # and one linear layer


def test_vgg_costs_the_sum_of_its_layers():
    layers = [(32 * 32, 3, 32), (32 * 32, 32, 64), (16 * 16, 64, 64), (16 * 16, 64, 256), (8 * 8, 256, 256),
              (8 * 8, 256, 256), (4 * 4, 256, 256)]
    convs = sum(9 * pixels * width_in * width_out for pixels, width_in, width_out in layers)
    linear = 10 * (64 + 256 + 256)
    assert exit_costs(timm.create_model(NAMES[2])).macs[-1] == pytest.approx(convs + linear, rel=0.005)  # BN and pools


@pytest.mark.parametrize('name,kind,exits', [
    (NAMES[0], BasicBlock, [4, 8, 14, 18, 24, 28, 30]), (NAMES[1], DenseLayer, [6, 12, 22, 28, 38, 44, 48])])
def test_exits_follow_the_named_layers(name, kind, exits):
    counts = [sum(isinstance(layer, kind) for layer in stage.layers) for stage in timm.create_model(name).stages]
    assert [sum(counts[:k + 1]) for k in range(len(counts))] == exits


def test_resnet_costs_19_million_for_four_blocks():
    macs = exit_costs(timm.create_model(NAMES[0])).macs
    assert [(b - a) / 1e6 for a, b in ((macs[k], macs[k + 1]) for k in (0, 2, 4))] == pytest.approx([18.9] * 3, abs=0.1)


def test_resnet_with_the_usual_first_block_of_a_resolution():
    usual = exit_costs(timm.create_model(NAMES[0], narrow_stride=False)).macs[-1]
    assert usual / 1e6 == pytest.approx(139.64, abs=0.01)


def test_resnet_shortcut_is_subsampled_and_padded():
    torch.manual_seed(0)
    block = BasicBlock(8, 8, 16, 2, act_layer=nn.ReLU).eval()
    nn.init.zeros_(block.conv2.bn.weight)
    x = torch.rand(2, 8, 7, 6)
    y = block([x])[0]
    assert torch.equal(y[:, :8], x[:, :, ::2, ::2]) and torch.all(y[:, 8:] == 0)
    nn.init.ones_(block.conv2.bn.weight)
    torch.testing.assert_close(block([x])[0], torch.relu(y + block.conv2(block.conv1(x))))
    same = BasicBlock(8, 8, 8, 1, act_layer=nn.ReLU).eval()
    torch.testing.assert_close(same([x])[0], torch.relu(x + same.conv2(same.conv1(x))))


def test_densenet_keeps_its_input_and_reduces_channels_between_blocks():
    torch.manual_seed(0)
    layer = DenseLayer(6, 3, norm_act_layer=nn.BatchNorm2d).eval()
    x = torch.randn(2, 6, 8, 8)
    assert torch.equal(layer([x])[0][:, :6], x) and layer([x])[0].shape == (2, 9, 8, 8)
    transitions = [m for m in timm.create_model(NAMES[1]).modules() if isinstance(m, Transition)]
    assert [(t.conv.conv.in_channels, t.conv.conv.out_channels) for t in transitions] == [(144, 36), (164, 41)]


@pytest.mark.parametrize('name,kwargs', [
    (NAMES[0], dict(widths=(8, 8), depth=2, exit_after=(1, 2))), (NAMES[0], dict(depth=1, exit_after=())),
    (NAMES[0], dict(widths=(8, 16), depth=3, exit_after=(1,), narrow_stride=False)),
    (NAMES[1], dict(num_blocks=2, depth=3, exit_after=(1, 3), growth=4)),
    (NAMES[1], dict(num_blocks=1, depth=2, exit_after=(1,), compression=0.5, base_width=4)),
    (NAMES[2], dict(widths=(8,))), (NAMES[2], dict(stem_width=4, widths=(8, 16, 8, 8))),
    (NAMES[2], dict(widths=(8, 16), depth=1)), (NAMES[2], dict(widths=(8, 16), depth=4)),
])
def test_other_configurations_train(name, kwargs):
    model = timm.create_model(name, num_classes=7, **kwargs).train()
    model.set_exit_training(True)
    logits = model(torch.randn(2, 3, 32, 32))
    assert all(x.shape == (2, 7) for x in logits)
    sum(x.sum() for x in logits).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize('name,kwargs,match', [
    (NAMES[0], dict(widths=()), 'resolutions'), (NAMES[0], dict(widths=(16, 8, 8)), 'widths'),
    (NAMES[0], dict(depth=0), 'layers'), (NAMES[0], dict(exit_after=(4, 11)), 'numbered 1 to 10'),
    (NAMES[0], dict(exit_after=(0,)), 'numbered'), (NAMES[1], dict(num_blocks=0), 'resolutions'),
    (NAMES[1], dict(growth=0), 'growth'), (NAMES[1], dict(base_width=0), 'base_width'),
    (NAMES[1], dict(compression=0), 'compression'), (NAMES[1], dict(exit_after=(17,)), 'numbered 1 to 16'),
    (NAMES[2], dict(widths=()), 'resolution'), (NAMES[2], dict(widths=(8, 0)), 'widths'),
    (NAMES[2], dict(depth=0), 'depth'),
])
def test_impossible_configurations_are_refused(name, kwargs, match):
    with pytest.raises(ValueError, match=match):
        timm.create_model(name, **kwargs)
