"""A training step as one CUDA graph: split parameter groups update like whole ones, a replay like a plain step."""
import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2

import timm_multiexit  # noqa: F401  (registers the networks)
from timm_multiexit.training.cuda_graph import GraphedStep, split_groups
from timm_multiexit.training.options import parse_train_args


def small_network():
    torch.manual_seed(0)
    return timm.create_model('resnet62_mc_cifar.cifar10', widths=(8, 16), depth=1, exit_after=())


def optimizer_of(model, **kwargs):
    return create_optimizer_v2(model, opt='nmuon', lr=0.02, momentum=0.95, weight_decay=0.05, **kwargs)


def batch(device='cpu'):
    generator = torch.Generator().manual_seed(1)
    images, targets = torch.randn(16, 3, 32, 32, generator=generator), torch.randint(10, (16,), generator=generator)
    return images.to(device), targets.to(device)


def gradients_of(model):
    def gradients(images, targets):
        loss = F.cross_entropy(model(images), targets)
        loss.backward()
        return loss
    return gradients


def test_split_groups_hold_each_weight_once_with_its_options():
    optimizer = optimizer_of(small_network())
    split = split_groups(optimizer.param_groups, 3)
    whole = [p for group in optimizer.param_groups for p in group['params']]
    parts = [p for group in split for p in group['params']]
    assert len(parts) == len(whole) and {id(p) for p in parts} == {id(p) for p in whole}
    assert sorted(group['weight_decay'] for group in split) == [0., 0.05, 0.05, 0.05]  # the vectors stay together
    assert all(group['params'] and group['momentum'] == 0.95 for group in split)
    sizes = [sum(p.numel() for p in group['params']) for group in split if group['weight_decay']]
    assert min(sizes) > 0.1 * max(sizes)


def test_split_groups_update_like_whole_ones():
    models = [small_network() for _ in range(2)]
    for model, parts in zip(models, (0, 4)):
        model.train()
        optimizer = optimizer_of(model)
        gradients_of(model)(*batch())
        groups = optimizer.param_groups
        for group in split_groups(groups, parts) if parts else groups:
            optimizer.param_groups = [group]
            optimizer.step()
    for (name, whole), split in zip(models[0].named_parameters(), models[1].parameters()):
        torch.testing.assert_close(split, whole, msg=name)
    fresh, updated = (m.get_parameter('exits.0.fc.weight') for m in (small_network(), models[1]))
    assert not torch.equal(fresh, updated)


@pytest.mark.parametrize('extra', [['--device', 'cpu'], ['--kd-draw']])
def test_graph_needs_a_cuda_device_and_no_drawn_teacher(capsys, extra):
    with pytest.raises(SystemExit):
        parse_train_args('', ['--cuda-graph', *extra])
    assert '--cuda-graph needs --device cuda' in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_replayed_steps_equal_plain_ones():
    model = small_network().cuda().train()
    plain = copy.deepcopy(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    images, targets = batch('cuda')
    optimizer = optimizer_of(model, capturable=True)
    step = GraphedStep(gradients_of(model), model, optimizer, images, targets)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())  # the capture changed nothing
    optimizer_plain = optimizer_of(plain)
    for lr in (0.01, 0.001):
        for group in (*optimizer.param_groups, *optimizer_plain.param_groups):
            group['lr'] = lr
        graphed = step(images, targets)
        expected = gradients_of(plain)(images, targets)
        optimizer_plain.step()
        optimizer_plain.zero_grad()
        torch.testing.assert_close(graphed, expected.detach(), rtol=1e-2, atol=1e-3)
    for (name, whole), other in zip(model.named_parameters(), plain.parameters()):
        torch.testing.assert_close(whole, other, rtol=0.05, atol=5e-3, msg=name)
