"""Early exit in a batch: what comes out is what the policy says, and nothing runs that need not."""
import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from conftest import NETWORKS, PROJECT, SAMPLES, SMALL, SMALL_NETWORKS, exit_logits
from timm.data import resolve_data_config

from timm_multiexit.data.splits import open_splits
from timm_multiexit.datasets import normalize
from timm_multiexit.errors import InputError
from timm_multiexit.inference.anytime import AnytimeRunner
from timm_multiexit.inference.engine import make_engine
from timm_multiexit.inference.runner import EarlyExitRunner, Run
from timm_multiexit.inference.traffic import ExpectedTraffic
from timm_multiexit.models._costs import exit_costs
from timm_multiexit.models._pretrained import WEIGHTS_DIR
from timm_multiexit.pretrained.load import load_model
from timm_multiexit.stopping.costs import ExitCosts
from timm_multiexit.stopping.policy import ALWAYS, NEVER, ExitPolicy, scores
from timm_multiexit.stopping.simulate import Simulation, simulate

pytestmark = pytest.mark.usefixtures('one_thread')

# PyTorch picks a convolution algorithm by the batch size, so that the last bits of the logits depend on it. Only an
# image whose confidence is a threshold but for these bits may then leave at another exit. With onnxruntime none may.
TIE = {'torch': 1e-5, 'onnx': 0.}


def all_logits(engine, images, batch_size=250):
    """Logits of every exit (num_exits, N, num_classes), each computed for all images."""
    return torch.cat([torch.stack(exit_logits(engine, x)) for x in images.split(batch_size)], 1)


def spread_policy(logits, keep, exits=None):
    """Thresholds that 1 - keep of all images reach at each exit; at `exits` only, if given.

    The temperatures bring logits of untrained networks, which can be in the hundreds, to a common scale.
    """
    last = len(logits) - 1
    temperatures = tuple(float(x.std()) for x in logits)
    thresholds = []
    for k in range(last):
        used = exits is None or k in exits
        thresholds.append(float(scores(logits[k], temperature=temperatures[k]).quantile(keep)) if used else NEVER)
    return ExitPolicy((*thresholds, ALWAYS), temperatures)


def as_tensors(result: Simulation) -> Simulation:
    return Simulation(**{name: torch.from_numpy(values) for name, values in vars(result).items()})


def assert_as_simulated(run: Run, policy, logits, costs, tie):
    """The run took the decisions and gave the answers of the simulated policy, but for ties."""
    expected = as_tensors(simulate(policy, logits, costs.macs))
    measured = torch.stack([scores(x, policy.measure, t) for x, t in zip(logits, policy.temperatures)])
    distance = (measured - torch.tensor(policy.thresholds).unsqueeze(1))[:-1].abs().amin(0)
    same = run.exit_index == expected.exit_index
    assert bool((same | (distance < tie)).all())
    chosen = logits[expected.exit_index, torch.arange(len(run.exit_index))]
    torch.testing.assert_close(run.logits[same], chosen[same], atol=tie * float(chosen.abs().max()), rtol=0.)
    torch.testing.assert_close(run.confidence[same], expected.confidence[same], atol=tie, rtol=0)
    top = chosen.topk(2, 1).values
    clear = same & (top[:, 0] - top[:, 1] >= 2 * tie * float(chosen.abs().max()))
    assert torch.equal(run.prediction[clear], expected.prediction[clear])
    assert torch.equal(run.macs[same], expected.macs[same])
    assert int((~same).sum()) <= 0.01 * len(same)


@pytest.fixture(scope='module')
def photos(cifar_root):
    """The first test images of CIFAR-10, as its networks see them, and their labels."""
    test = open_splits('torch/cifar10', cifar_root).test
    images, targets = test.pixels, test.targets
    config = resolve_data_config(model=timm.create_model('msfuse_cifar', **SMALL))
    return normalize(images, config['mean'], config['std']), targets


@pytest.fixture(scope='module')
def small():
    torch.manual_seed(0)
    model = timm.create_model('msfuse_cifar', **SMALL).eval()
    return model, exit_costs(model)


@pytest.fixture(scope='module', params=['torch', 'onnx'])
def engine(request, small):
    return make_engine(small[0], request.param, **(dict(threads=2) if request.param == 'onnx' else {}))


EXPORT = pytest.mark.slow('40 s of CPU time: exporting the nine full networks to ONNX')


@pytest.mark.parametrize('engine_name', ['torch', 'onnx'])
@pytest.mark.parametrize('name, kwargs', [
    *(pytest.param(name, kwargs, id=f'{name}-small') for name, kwargs in SMALL_NETWORKS.items()),
    *(pytest.param(name, {}, id=name, marks=EXPORT) for name in NETWORKS)])
def test_every_network_runs_as_simulated(name, kwargs, photos, engine_name):
    network = timm.create_model(name, **kwargs).eval()
    images = photos[0][:48]
    engine = make_engine(network, engine_name)
    costs = ExitCosts(tuple(range(1, network.num_exits + 1)), (1,) * network.num_exits, (3, 32, 32))
    logits = all_logits(engine, images, 48)
    for policy in (spread_policy(logits, 0.7), spread_policy(logits, 0.5, exits=(0, 2))):
        runner = EarlyExitRunner(engine, policy, costs=costs)
        for batch_size in (1, 7, 256):
            assert_as_simulated(runner.run(images, batch_size), policy, logits, costs, TIE[engine_name])


@pytest.mark.parametrize('keep', [0.2, 0.6, 0.95])
@pytest.mark.parametrize('measure', ['max_softmax', 'margin'])
def test_both_engines_run_as_simulated(engine, small, photos, keep, measure):
    images, costs = photos[0][:200], small[1]
    logits = all_logits(engine, images)
    policy = spread_policy(logits, keep)
    policy = ExitPolicy(policy.thresholds, policy.temperatures, measure)
    for chunk_size in (1, 7, 32, 256):
        runner = EarlyExitRunner(engine, policy, costs=costs, chunk_size=chunk_size)
        for batch_size in (1, 7, 256):
            assert_as_simulated(runner.run(images, batch_size), policy, logits, costs, TIE[engine.name])


@pytest.mark.skipif(not (WEIGHTS_DIR / 'msfuse_cifar.cifar10' / 'model.safetensors').is_file(),
                    reason='the trained weights are not in the package')
@pytest.mark.parametrize('count', [
    1000, pytest.param(10_000, marks=pytest.mark.slow('80 s of CPU time: all test images, five times'))])
def test_trained_network_runs_exactly_as_simulated(photos, count):
    images, targets = photos[0][:count], photos[1][:count]
    model = load_model('msfuse_cifar.cifar10')
    engine, costs = make_engine(model, 'onnx', threads=2), exit_costs(model)
    logits = all_logits(engine, images)
    for keep, exits, batch_sizes in ((0.3, None, (256,)), (0.6, (0, 2), (1, 256)), (0.9, None, (7,))):
        policy = spread_policy(logits, keep, exits)
        runner = EarlyExitRunner(engine, policy, costs=costs)
        for batch_size in batch_sizes:
            run = runner.run(images, batch_size)
            assert_as_simulated(run, policy, logits, costs, 0.)
            assert run.accuracy(targets) > 60.


class CountingEngine:
    """A real engine that also writes down each segment that it runs, and for how many images."""

    def __init__(self, engine):
        self.engine, self.calls = engine, []

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def run(self, first, last, state):
        self.calls.append((first, last, len(state[0])))
        return self.engine.run(first, last, state)


def test_stages_run_on_those_left_only_and_not_at_all_when_none_is(small, photos):
    model, costs = small
    images = photos[0][:96]
    engine = CountingEngine(make_engine(model))
    logits = all_logits(engine, images)
    policy = spread_policy(logits, 0.5)
    engine.calls = []
    run = EarlyExitRunner(engine, policy, costs=costs, chunk_size=32).run(images)
    assert engine.calls[:3] == [(0, 0, 32)] * 3
    for k in (1, 2):
        left = int((run.exit_index >= k).sum())
        ran = [n for first, last, n in engine.calls if first == last == k]
        assert 0 < left < 96
        assert sum(ran) == left and len(ran) <= -(-left // 16)  # regrouped: no more chunks than half full ones

    engine.calls = []
    EarlyExitRunner(engine, ExitPolicy.at_exit(0, 3), costs=costs).run(images)
    assert {call[:2] for call in engine.calls} == {(0, 0)}


def test_a_few_that_left_are_carried_along_rather_than_copying_all_others(small, photos):
    model, costs = small
    images = photos[0][:40]
    engine = CountingEngine(make_engine(model))
    logits = all_logits(engine, images)
    highest = scores(logits[0]).sort().values
    policy = ExitPolicy((float(highest[-2:].mean()), NEVER, ALWAYS), (1.,) * 3)  # one image leaves
    engine.calls = []
    run = EarlyExitRunner(engine, policy, costs=costs, chunk_size=40).run(images)
    assert engine.calls == [(0, 0, 40), (1, 2, 40)]
    assert run.exit_index.tolist().count(0) == 1
    assert_as_simulated(run, policy, logits, costs, TIE['torch'])


def test_heads_at_which_no_image_may_leave_do_not_run(small, photos):
    engine = CountingEngine(make_engine(small[0]))
    runner = EarlyExitRunner(engine, ExitPolicy((NEVER, 0.5, ALWAYS), (1.,) * 3), costs=small[1])
    assert runner.segments == ((0, 1), (2, 2))
    full = EarlyExitRunner(engine, ExitPolicy((NEVER, NEVER, ALWAYS), (1.,) * 3), costs=small[1])
    assert full.segments == ((0, 2),)
    images = photos[0][:8]
    with torch.inference_mode():
        torch.testing.assert_close(full.run(images).logits, small[0](images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('batch_size', [1, 7, 200])
def test_expected_traffic_leaves_in_the_shares_that_are_expected(engine, small, photos, batch_size):
    policy = ExitPolicy((0., NEVER, 0.), (1.,) * 3, exit_shares=(0.6, 0., 0.4))
    runner = EarlyExitRunner(engine, ExpectedTraffic(policy, images=200), costs=small[1])
    exits = runner.run(photos[0][:200], batch_size).exit_index
    assert np.bincount(exits, minlength=3).tolist() == [120, 0, 80]
    assert runner.segments == ((0, 0), (1, 2)) and len(set(exits[:20].tolist())) == 2


class Stream(torch.utils.data.IterableDataset):
    """Without a length."""

    def __init__(self, images):
        self.images = images

    def __iter__(self):
        return iter(self.images)


def test_loader_tensor_and_folder_give_the_same(engine, small, photos, tmp_path):
    model, costs = small
    policy = spread_policy(all_logits(engine, photos[0][:100]), 0.6)
    runner = EarlyExitRunner(engine, policy, costs=costs)
    whole = runner(photos[0][:100])
    dataset = torch.utils.data.TensorDataset(photos[0][:100], photos[1][:100])
    for batches, has_targets in (
            (torch.utils.data.DataLoader(dataset, batch_size=30), True),
            (torch.utils.data.DataLoader(torch.utils.data.TensorDataset(photos[0][:100]), batch_size=30), False),
            (torch.utils.data.DataLoader(Stream(photos[0][:100]), batch_size=30), False),
            (iter(photos[0][:100].split(30)), False)):
        run = runner(batches)
        assert torch.equal(run.exit_index, whole.exit_index)
        torch.testing.assert_close(run.logits, whole.logits, atol=1e-5, rtol=1e-4)
        if has_targets:
            assert torch.equal(run.targets, photos[1][:100])
        else:
            assert run.targets is None


def test_a_folder_runs_in_the_order_of_its_names(small, photos, tmp_path):
    model, costs = small
    runner = EarlyExitRunner(model, ExitPolicy((0.3, 0.3, ALWAYS), (1.,) * 3), costs=costs)
    paths, run = runner.run_folder(SAMPLES, batch_size=3)
    assert [p.name for p in paths] == sorted(p.name for p in SAMPLES.glob('*.png')) and len(paths) == 10
    numbers = [int(p.name.split('_')[2]) for p in paths]  # the samples are test images, named by their number
    torch.testing.assert_close(run.logits, runner.run(photos[0][numbers]).logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(runner(str(SAMPLES)).prediction, run.prediction)
    with pytest.raises(InputError, match='batch_size 0'):
        runner.run_folder(SAMPLES, batch_size=0)
    with pytest.raises(InputError, match='holds no images'):
        runner.run_folder(tmp_path)
    with pytest.raises(InputError, match='is not a folder'):
        runner.run_folder(tmp_path / 'none')


@pytest.mark.parametrize('images, words', [
    (torch.zeros(0, 3, 32, 32), 'empty batch'),
    (np.zeros((1, 3, 32, 32)), 'of type ndarray: give a tensor'),
    (torch.zeros(3, 32, 32), r'give a tensor \(images, 3, height, width\)'),
    (torch.zeros(2, 1, 32, 32), r'shape \(2, 1, 32, 32\)'),
    (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), 'normalise them'),
])
def test_bad_images_are_refused(small, images, words):
    runner = EarlyExitRunner(small[0], ExitPolicy((0.5, 0.5, ALWAYS), (1.,) * 3), costs=small[1])
    with pytest.raises(InputError, match=words):
        runner.run(images)
    with pytest.raises(InputError, match=words):
        runner.run_loader([images])


def test_a_policy_or_costs_of_another_network_nan_logits_and_nothing_at_all_are_refused(small):
    model, costs = small
    policy = ExitPolicy((0.5, 0.5, ALWAYS), (1.,) * 3)
    with pytest.raises(InputError, match='2 exits does not fit a network with 3'):
        EarlyExitRunner(model, ExitPolicy((0.5, 0.), (1.,) * 2))
    with pytest.raises(InputError, match='does not fit a network with 1'):
        EarlyExitRunner(model, policy, costs=ExitCosts((1,), (1,), (3, 32, 32)))
    with pytest.raises(InputError, match='pass costs'):
        EarlyExitRunner(make_engine(model), policy)
    with pytest.raises(InputError, match='batch_size 0'):
        EarlyExitRunner(model, policy, costs=costs).run(torch.zeros(1, 3, 32, 32), 0)
    with pytest.raises(InputError, match='no images to run'):
        EarlyExitRunner(model, policy, costs=costs).run_loader([])
    broken = copy.deepcopy(model)
    broken.exits[1].fc.bias.data[0] = float('nan')
    with pytest.raises(InputError, match='have NaN or infinite logits'):
        EarlyExitRunner(broken, ExitPolicy((1., 0.5, ALWAYS), (1.,) * 3), costs=costs).run(torch.zeros(2, 3, 32, 32))


SHARED_RUN = """
import os, sys
import timm, torch, torch.distributed as dist
import timm_multiexit
from timm_multiexit.errors import InputError
from timm_multiexit import EarlyExitRunner, ExitPolicy
shared = len(sys.argv) > 2
if shared:
    dist.init_process_group('gloo')
torch.manual_seed(0)
model = timm.create_model('msfuse_cifar', steps=(2, 2, 2), base_width=8, growth=4, head_width=16).eval()
images, targets = torch.randn(70, 3, 32, 32), torch.arange(70)
runner = EarlyExitRunner(model, ExitPolicy((0.2, 0.3, -1e9), (1.,) * 3))
runs = [runner.run(images, 8), runner.run(images[:1]),
        runner.run_loader([(images[i:i + 16], targets[i:i + 16]) for i in range(0, 70, 16)])]
images[3] = float('nan')  # in the first process's share
try:
    runner.run(images, 8)
except InputError as error:
    message = str(error)
if not shared or dist.get_rank() == 1:
    torch.save(([vars(run) for run in runs], message), sys.argv[1])
if shared:
    dist.barrier()  # PyTorch 2.6 hangs where one process leaves first
    os._exit(0)  # its destroy_process_group hangs too, once in 40 runs
"""


def test_two_processes_share_the_images_and_both_return_the_result_of_one(tmp_path):
    script = tmp_path / 'shared.py'
    script.write_text(SHARED_RUN)
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(PROJECT))
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    for command in ([sys.executable, script, tmp_path / 'one.pt'],
                    [*torchrun, script, tmp_path / 'two.pt', 'shared']):
        done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / name) for name in ('one.pt', 'two.pt'))
    assert one[1] == two[1] and 'NaN' in one[1]
    for a, b in zip(one[0], two[0]):
        assert len(set(a['exit_index'].tolist())) > 1 or len(a['exit_index']) == 1
        for name in ('exit_index', 'prediction', 'macs', 'targets'):
            assert (a[name] is None and b[name] is None) or torch.equal(a[name], b[name]), name
        torch.testing.assert_close(a['logits'], b['logits'])


def test_a_budget_for_one_image_gives_the_deepest_exit_within_it(engine, small, photos):
    model, costs = small
    runner = AnytimeRunner(engine, costs=costs, temperatures=(2., 1., 1.))
    image = photos[0][:1]
    logits = all_logits(engine, image)
    for k, macs in enumerate(costs.macs):
        for budget in (macs, macs * 1.01):
            run = runner.within_budget(image, budget)
            assert run.exit_index.tolist() == [k] and run.macs.tolist() == [macs]
            torch.testing.assert_close(run.logits, logits[k], atol=1e-5, rtol=1e-4)
    flat = float((logits[0] / 2.).softmax(1).amax())
    assert float(runner.within_budget(image, costs.macs[0]).confidence) == pytest.approx(flat, abs=1e-5)
    with pytest.raises(InputError, match='below the first exit'):
        runner.within_budget(image, costs.macs[0] - 1)


def test_a_deadline_stops_before_the_stage_that_would_miss_it(small, photos):
    model, costs = small
    runner = AnytimeRunner(model, costs=costs)
    image = photos[0][:1]
    assert runner.within_time(image, 1e-6).exit_index.tolist() == [0]  # the first exit always answers
    assert runner.within_time(image, 1e6).exit_index.tolist() == [2]
    measured = runner.step_times[tuple(image.shape)]
    assert len(measured) == 3 and min(measured) > 0.
    # As if the last stage took a minute: it is not begun, however much of half a minute is left.
    runner.step_times[tuple(image.shape)] = (*measured[:2], 60e3)
    run = runner.within_time(image, 30e3)
    assert run.exit_index.tolist() == [1] and run.macs.tolist() == [costs.macs[1]]
    with torch.inference_mode():
        torch.testing.assert_close(run.logits, model.forward_exits(image)[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('deadline', [0., -1., float('nan'), float('inf')])
def test_a_deadline_that_is_no_time_is_refused(small, deadline):
    with pytest.raises(InputError, match='give a positive number'):
        AnytimeRunner(small[0], costs=small[1]).within_time(torch.zeros(1, 3, 32, 32), deadline)


def test_anytime_refuses_what_does_not_fit(small):
    with pytest.raises(InputError, match='3 costs and 2 temperatures for a network with 3 exits'):
        AnytimeRunner(small[0], costs=small[1], temperatures=(1., 1.))
    with pytest.raises(InputError, match='empty batch'):
        AnytimeRunner(small[0], costs=small[1]).within_budget(torch.zeros(0, 3, 32, 32), small[1].macs[0])
    with pytest.raises(InputError, match='normalise them to floats'):
        AnytimeRunner(small[0], costs=small[1]).within_time(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), 1e6)
