"""Prepared networks: folding changes nothing but the speed, and both engines run any segment of any network."""
import copy

import numpy as np
import pytest
import timm
import torch
from conftest import SMALL, exit_logits
from timm.layers import ConvNormAct
from torch import nn

from timm_multiexit.errors import InputError
from timm_multiexit.inference.engine import make_engine
from timm_multiexit.inference.runner import EarlyExitRunner
from timm_multiexit.inference.torch_engine import TorchEngine
from timm_multiexit.models import exit_costs
from timm_multiexit.models._fold import fold
from timm_multiexit.stopping.policy import ExitPolicy

pytestmark = pytest.mark.usefixtures('one_thread')


def train_statistics(model: nn.Module) -> nn.Module:
    """Gives every BN statistics and weights as training would, for which folding is no identity."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias.data):
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
            for tensor in (module.running_var, module.weight.data):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return model


@pytest.fixture
def images():
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def test_folding_keeps_the_logits_of_every_network(network, images):
    train_statistics(network)
    folded = fold(network)
    with torch.inference_mode():
        for before, after in zip(network.forward_exits(images), folded.forward_exits(images)):
            scale = before.abs().amax()
            assert float((before - after).abs().amax() / scale) < 1e-5
    assert not any(isinstance(m.bn, nn.BatchNorm2d) for m in folded.modules() if isinstance(m, ConvNormAct))


def test_no_batch_norm_is_left_in_msfuse_and_the_original_keeps_its_own(small_msfuse):
    count = sum(isinstance(m, nn.BatchNorm2d) for m in small_msfuse.modules())
    weights = {k: v.clone() for k, v in small_msfuse.state_dict().items()}
    folded = fold(small_msfuse.train())
    assert count > 20
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules()) and not folded.training
    assert small_msfuse.training
    assert all(torch.equal(v, weights[k]) for k, v in small_msfuse.state_dict().items())


def test_a_batch_norm_behind_a_convolution_in_a_sequential_is_folded_and_one_before_it_stays():
    net = train_statistics(nn.Sequential(
        nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())).eval()
    folded = fold(net)
    assert [type(m) for m in folded] == [nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.Identity, nn.ReLU]
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(folded(x), net(x))


@pytest.mark.parametrize('kwargs', [dict(norm_layer='groupnorm1'), dict(act_layer=nn.GELU)])
def test_other_norms_and_activations_are_kept(images, kwargs):
    model = timm.create_model('msfuse_cifar', steps=(1, 1), base_width=8, growth=4, **kwargs).eval()
    torch.testing.assert_close(fold(model)(images), model(images))


@pytest.fixture(scope='module', params=['torch', 'auto'])
def model_and_engine(request):
    """A small network with trained statistics, and each engine of it; 'auto' is onnx on a CPU."""
    torch.manual_seed(0)
    model = train_statistics(timm.create_model('msfuse_cifar', **SMALL).eval())
    return model, make_engine(model, request.param)


def test_an_engine_gives_every_exit_of_the_network(model_and_engine, images):
    model, prepared = model_and_engine
    with torch.inference_mode():
        expected = model.forward_exits(images)
        for k, logits in enumerate(exit_logits(prepared, images)):
            torch.testing.assert_close(logits, expected[k], atol=1e-4, rtol=1e-4)
            skipping = torch.from_numpy(prepared.run(0, k, prepared.start(images))[1])
            torch.testing.assert_close(skipping, expected[k], atol=1e-4, rtol=1e-4)


def test_gathered_rows_run_on_as_if_they_had_been_together(model_and_engine, images):
    prepared = model_and_engine[1]
    state, _ = prepared.run(0, 0, prepared.start(images))
    expected = prepared.run(1, 2, state)[1]
    rows = np.array([3, 0, 4])
    close = dict(atol=1e-5, rtol=1.3e-6)
    np.testing.assert_allclose(prepared.run(1, 2, prepared.gather([(state, rows)]))[1], expected[rows], **close)
    twice = prepared.gather([(state, np.array([2])), (state, None)])
    np.testing.assert_allclose(
        prepared.run(1, 2, twice)[1], np.concatenate([expected[2:3], expected]), **close)
    assert prepared.gather([(state, None)]) is state


def test_both_engines_are_had_by_name(model_and_engine):
    model, prepared = model_and_engine
    assert prepared.name in ('torch', 'onnx')
    assert (prepared.num_exits, prepared.num_classes, prepared.in_chans) == (model.num_exits, 10, 3)


def test_the_torch_engine_is_channels_last_and_runs_in_bfloat16(small_msfuse, images):
    exact, fast = TorchEngine(small_msfuse), TorchEngine(small_msfuse, dtype=torch.bfloat16)
    with torch.inference_mode():
        state, _ = fast.run(0, 0, fast.start(images))
        assert all(x.dtype == torch.bfloat16 and x.is_contiguous(memory_format=torch.channels_last) for x in state)
    for a, b in zip(exit_logits(exact, images), exit_logits(fast, images)):
        assert b.dtype == torch.float32
        assert float((a - b).abs().max()) < 0.05 * float(a.abs().max())


def test_an_engine_of_one_size_refuses_others(small_msfuse):
    costs, policy = exit_costs(small_msfuse), ExitPolicy.at_exit(0, small_msfuse.num_exits)
    for engine in ('torch', 'onnx'):
        runner = EarlyExitRunner(small_msfuse, policy, engine, costs=costs)
        if engine == 'torch':
            assert len(runner.run(torch.zeros(2, 3, 48, 48)).prediction) == 2
        else:
            with pytest.raises(InputError, match='images of 48 x 48 pixels: this engine takes 32 x 32'):
                runner.run(torch.zeros(2, 3, 48, 48))


def test_engines_that_cannot_be_had_are_refused(small_msfuse, monkeypatch):
    with pytest.raises(InputError, match="unknown engine 'tensorrt': choose one of auto, torch, onnx"):
        make_engine(small_msfuse, 'tensorrt')
    with pytest.raises(InputError, match='0 classes'):
        make_engine(timm.create_model('msfuse_cifar', num_classes=0))
    with pytest.raises(InputError, match="runs on the CPU only, not on 'cuda'"):
        make_engine(small_msfuse, 'onnx', device='cuda')
    with pytest.raises(InputError, match="runs on the CPU only, not on 'meta'"):
        make_engine(copy.deepcopy(small_msfuse).to('meta'), 'onnx')
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)  # as if nothing were installed
    with pytest.raises(InputError, match='needs onnx, onnxruntime, onnxscript: pip install'):
        make_engine(small_msfuse, 'onnx')
    assert make_engine(small_msfuse, 'auto').name == 'torch'
