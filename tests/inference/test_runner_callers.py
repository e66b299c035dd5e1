"""What the runner meets where it is called from: forked processes, loaders of any kind, other precisions."""
import os
import time

import numpy as np
import pytest
import timm
import torch
from conftest import SMALL

from timm_multiexit.errors import InputError
from timm_multiexit.inference.engine import make_engine
from timm_multiexit.inference.runner import EarlyExitRunner
from timm_multiexit.models import exit_costs
from timm_multiexit.stopping.policy import ExitPolicy

POLICY = ExitPolicy.at_confidence(0.5, (1.,) * 3)


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    model = timm.create_model('msfuse_cifar', **SMALL).eval()
    with torch.no_grad():
        for head in model.exits:  # an untrained network is never confident
            head.fc.weight *= 10
    return model


@pytest.fixture(scope='module')
def images():
    return torch.randn(48, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def child_status(run, seconds: float = 60.) -> int:
    """Exit status of a forked child that calls `run`; -9 if it hangs."""
    child = os.fork()
    if child == 0:
        try:
            run()
            os._exit(0)
        except BaseException:
            os._exit(1)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, 9)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='this system has no fork')
@pytest.mark.parametrize('engine', ['torch', 'onnx'])
def test_a_forked_process_answers_like_its_parent(model, images, engine, one_thread):
    """Pool threads are not inherited: servers and data loaders fork after a runner was used."""
    threads = {} if engine == 'torch' else dict(threads=2)
    runner = EarlyExitRunner(make_engine(model, engine, **threads), POLICY, costs=exit_costs(model))
    before = runner.run(images, 8)
    assert 0 < before.exit_index.float().mean() < 2

    def again():
        assert torch.equal(runner.run(images, 8).logits, before.logits)
        torch.testing.assert_close(runner.run(images[:1]).logits, before.logits[:1])  # one image takes another way

    assert child_status(again) == 0
    again()


@pytest.mark.parametrize('kind', [list, tuple, np.asarray, torch.as_tensor])
def test_targets_of_a_loader_may_be_of_any_kind(model, images, kind):
    runner = EarlyExitRunner(model, POLICY)
    targets = [i % 10 for i in range(len(images))]
    run = runner.run_loader([(images[:32], kind(targets[:32])), (images[32:], kind(targets[32:]))])
    assert run.targets.tolist() == targets and torch.equal(run.logits, runner.run(images, 32).logits)


@pytest.mark.parametrize('engine', ['torch', 'onnx'])
def test_autocast_does_not_move_images_between_exits(model, images, engine):
    runner = EarlyExitRunner(model, POLICY, engine)
    plain = runner.run(images)
    with torch.autocast('cpu', torch.bfloat16):
        within = runner.run(images)
    assert torch.equal(plain.logits, within.logits) and torch.equal(plain.exit_index, within.exit_index)


@pytest.mark.parametrize('engine', ['torch', 'onnx'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_images_of_less_precision_than_the_engine_are_refused(model, images, engine, dtype):
    with pytest.raises(InputError, match=f'images of {dtype} for an engine of torch.float32'):
        EarlyExitRunner(model, POLICY, engine).run(images.to(dtype))
    assert len(EarlyExitRunner(model, POLICY, engine).run(images.double()).logits) == len(images)
