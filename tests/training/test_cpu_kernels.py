"""The package's CPU training kernels against PyTorch in float32, by layer and as a network."""
import copy
import shutil

import pytest
import timm
import torch
from timm.layers import ConvNormAct

import timm_multiexit.training.cpu_kernels
from timm_multiexit.errors import InputError
from timm_multiexit.training.cpu_kernels import cpu_kernels_supported, use_cpu_kernels
from timm_multiexit.training.options import parse_train_args

needs_kernels = pytest.mark.skipif(
    not (cpu_kernels_supported() and shutil.which('c++') and shutil.which('ninja')),
    reason='no processor with AVX-512 and bfloat16, no C++ compiler, or no ninja')


def gradients(layer, x, weight):
    """Output and all gradients of a layer whose output is concatenated with its input, as in the networks."""
    x = x.detach().clone().contiguous(memory_format=torch.channels_last).requires_grad_()
    y = layer(x)
    inputs = [x[:, :, :y.shape[2], :y.shape[3]], y]
    (torch.cat(inputs, 1).float() * weight).sum().backward()
    return {'y': y.detach().float(), 'x': x.grad, 'mean': layer.bn.running_mean, 'var': layer.bn.running_var,
            **{k: p.grad for k, p in layer.named_parameters()}}


@needs_kernels
@pytest.mark.parametrize('in_chs, out_chs, kernel, stride, size', [
    (12, 24, 3, 2, 16), (20, 40, 3, 2, 7), (72, 17, 3, 2, 4), (48, 12, 1, 1, 9), (116, 33, 1, 1, 2), (12, 12, 3, 1, 16),
    (128, 128, 1, 1, 2), (3, 32, 3, 1, 32), (40, 16, 3, 2, 2),
])
def test_layer_matches_pytorch(in_chs, out_chs, kernel, stride, size):
    torch.manual_seed(in_chs)
    # The reference is float32 on inputs that bfloat16 represents exactly, so only the computation rounds. Rounding can
    # flip a ReLU whose input is near 0, with PyTorch's kernels too: their error sets the tolerance.
    plain = ConvNormAct(in_chs, out_chs, kernel, stride=stride)
    torch.nn.init.uniform_(plain.bn.weight, 0.5, 1.5)
    torch.nn.init.normal_(plain.bn.bias, std=0.3)
    plain.conv.weight.data = plain.conv.weight.data.bfloat16().float()
    rounded, fast = (copy.deepcopy(plain).to(memory_format=torch.channels_last) for _ in range(2))
    assert use_cpu_kernels(fast) >= 1
    x = torch.randn(8, in_chs, size, size).bfloat16().float()
    out_size = -(-size // stride)
    weight = torch.randn(8, in_chs + out_chs, out_size, out_size)
    expected = gradients(plain, x, weight)
    with torch.autocast('cpu', torch.bfloat16):
        usual, found = gradients(rounded, x, weight), gradients(fast, x, weight)
    assert fast.bn.num_batches_tracked == 1
    for name, value in expected.items():
        error, usual_error = ((g[name] - value).norm() / value.norm() for g in (found, usual))
        assert error < 0.1 and error < 0.005 + 1.2 * usual_error, name


def small_network(**kwargs):
    torch.manual_seed(3)
    return timm.create_model(
        'msfuse_cifar', **{'steps': (1, 2, 1), 'base_width': 40, 'growth': 6, 'head_width': 32, **kwargs})


def small_dense_network(name):
    torch.manual_seed(3)
    options = dict(depth=4, exit_after=(2,)) if name == 'densenet52_mc_cifar' else dict(
        scales=(1, 2, 2), block_layers=(2, 3, 3), exits_per_net=1, growth=8, width_factors=(2, 2, 1), head_width=32)
    network = timm.create_model(name, **options).to(memory_format=torch.channels_last).train()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.constant_(module.bias, 4.)  # no input of a ReLU is near 0, where rounding could flip it
        elif isinstance(module, torch.nn.Conv2d):
            module.weight.data = module.weight.data.bfloat16().float()
    return network


def block_gradients(block, state):
    """Maps, all gradients and the running statistics of a block in training."""
    state = [x.detach().clone().requires_grad_() for x in state]
    maps = block(state)
    generator = torch.Generator().manual_seed(0)
    loss = sum((x.float() * torch.randn(x.shape, generator=generator)).sum() for x in maps)
    loss.backward()
    return {**{f'map {i}': x.detach().float() for i, x in enumerate(maps)},
            **{f'state {i}': x.grad for i, x in enumerate(state) if x.grad is not None},
            **{name: p.grad for name, p in block.named_parameters()},
            **{name: b for name, b in block.named_buffers() if b.is_floating_point()}}


@needs_kernels
@pytest.mark.parametrize('size', [8, 15])
@pytest.mark.parametrize('name', ['ranet_cifar', 'densenet52_mc_cifar'])
def test_blocks_match_pytorch(name, size):
    network = small_dense_network(name)
    seen = []
    for layer in [layer for stage in network.stages for layer in stage.layers]:
        layer.register_forward_hook(lambda module, inputs, _: seen.append((module, inputs[0])))
    network.forward_exits(torch.randn(8, 3, size, size))
    changed = 0
    for plain, state in seen:
        plain._forward_hooks.clear()
        state = [x.detach().bfloat16().float() for x in state]
        rounded, fast = copy.deepcopy(plain), copy.deepcopy(plain)
        use_cpu_kernels(fast)
        if type(fast) is type(plain):
            continue
        changed += 1
        expected = block_gradients(plain, state)
        state = [x.bfloat16() for x in state]  # as autocast gives them
        with torch.autocast('cpu', torch.bfloat16):
            usual, found = block_gradients(rounded, state), block_gradients(fast, state)
        for key, value in expected.items():
            error, usual_error = ((g[key].float() - value).norm() / value.norm() for g in (found, usual))
            # Where rounding is larger than the gradient, as before another BN, nothing can be compared.
            assert error < 0.02 + 1.2 * usual_error or usual_error > 0.5, key
    assert changed >= 3


@needs_kernels
@pytest.mark.parametrize('frozen', ['stages.0.layers.1.conv.norm', 'stages.0.layers.1'])
def test_frozen_statistics_stay(frozen):
    network = small_dense_network('densenet52_mc_cifar')
    use_cpu_kernels(network)
    norm = network.get_submodule(frozen).eval().get_submodule('conv.norm' if frozen.endswith('1') else '')
    with torch.autocast('cpu', torch.bfloat16):
        network.forward_exits(torch.randn(4, 3, 32, 32))
    assert norm.running_mean.eq(0).all() and norm.num_batches_tracked == 0


@needs_kernels
def test_one_value_per_channel_is_refused():
    network = small_dense_network('densenet52_mc_cifar')
    use_cpu_kernels(network)
    with pytest.raises(ValueError, match='more than 1 value per channel'), torch.autocast('cpu', torch.bfloat16):
        network.forward_exits(torch.randn(1, 3, 4, 4))


@needs_kernels
def test_network_trains_and_predicts_as_before():
    plain, fast = small_network(), small_network()
    names = list(fast.state_dict())
    assert use_cpu_kernels(fast) > 30
    assert use_cpu_kernels(fast) == 0  # nothing is left to change
    assert list(fast.state_dict()) == names
    images, targets = torch.randn(64, 3, 32, 32), torch.arange(64) % 10
    losses = {}
    for name, model in (('plain', plain), ('fast', fast)):
        model.train().to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        losses[name] = []
        for _ in range(8):
            with torch.autocast('cpu', torch.bfloat16):
                loss = torch.nn.functional.cross_entropy(model(images).float(), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[name].append(loss.item())
    assert losses['fast'][-1] < 0.8 * losses['fast'][0]
    assert losses['fast'] == pytest.approx(losses['plain'], rel=0.05)
    plain.load_state_dict(fast.state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(fast.eval()(images), plain.eval()(images), rtol=0, atol=0)


@needs_kernels
@pytest.mark.parametrize('channels, size, out_size', [(5, 8, 16), (40, 9, 5), (1, 4, 7), (17, 1, 2)])
def test_resize_matches_pytorch(channels, size, out_size):
    """Maps and gradients are slices of channels, as where they are concatenated."""
    torch.manual_seed(0)
    maps, gradients = (
        torch.randn(3, channels + 3, side, side).bfloat16().contiguous(memory_format=torch.channels_last)[:, 2:-1]
        for side in (size, out_size))
    kernels = timm_multiexit.training.cpu_kernels._kernels()
    exact = maps.float().requires_grad_()
    expected = torch.nn.functional.interpolate(exact, size=(out_size, out_size), mode='bilinear', align_corners=True)
    expected.backward(gradients.float())
    for found, value in ((kernels.resize_forward(maps, out_size, out_size), expected),
                         (kernels.resize_backward(gradients, size, size), exact.grad)):
        torch.testing.assert_close(found.float(), value, rtol=0.005, atol=0.002)


@needs_kernels
def test_unsupported_layers_are_unchanged():
    network = small_network(act_layer=torch.nn.GELU)
    use_cpu_kernels(network)
    kinds = {type(m).__name__ for m in network.modules()}
    assert '_FastConv' in kinds and '_FastNormAct' not in kinds
    assert type(network.stages[0].layers[0].conv2.conv) is torch.nn.Conv2d  # depthwise


def test_unsupported_processor(monkeypatch):
    monkeypatch.setattr(timm_multiexit.training.cpu_kernels, 'cpu_kernels_supported', lambda: False)
    with pytest.raises(InputError, match='pass --no-cpu-kernels'):
        use_cpu_kernels(small_network())


@pytest.mark.parametrize('extra', [
    [], ['--amp'], ['--amp', '--channels-last', '--amp-dtype', 'float16'],
    ['--amp', '--channels-last', '--device', 'meta'], ['--amp', '--channels-last', '--torchcompile'],
])
def test_options_that_exclude_the_kernels(extra, capsys):
    with pytest.raises(SystemExit):
        parse_train_args('', ['--cpu-kernels', '--device', 'cpu', *extra])
    assert '--amp --channels-last --device cpu' in capsys.readouterr().err
