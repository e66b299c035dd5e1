"""The benchmark command: what it measures belongs together, on a small network and real images."""
import argparse
import json
import time

import pytest
import timm
import torch
from conftest import calibrated_network

from timm_multiexit.cli import benchmark, main
from timm_multiexit.cli.benchmark import print_results
from timm_multiexit.data.splits import open_splits
from timm_multiexit.datasets import normalize
from timm_multiexit.errors import InputError
from timm_multiexit.evaluation.timing import measure_exits, measure_policies, spread
from timm_multiexit.inference.engine import make_engine
from timm_multiexit.inference.profile import measure_profile, take_turns
from timm_multiexit.models._costs import exit_costs
from timm_multiexit.models._pretrained import WEIGHTS_DIR
from timm_multiexit.pretrained.exit_config import load_exit_config
from timm_multiexit.stopping.costs import StageCosts
from timm_multiexit.stopping.policy import ALWAYS, NEVER, ExitPolicy

needs_weights = pytest.mark.skipif(
    not (WEIGHTS_DIR / 'msfuse_cifar.cifar10' / 'model.safetensors').is_file(),
    reason='the trained weights are not in the package')


def test_all_tasks_take_turns_and_their_times_are_told_apart():
    order = []
    tasks = {name: lambda n=name, s=seconds: (order.append(n), time.sleep(s)) for name, seconds in
             (('slow', 0.03), ('fast', 0.003), ('middle', 0.012))}
    times = take_turns(tasks, 3, torch.device('cpu'), '')
    assert order == ['slow', 'fast', 'middle'] * 2 + ['fast', 'middle', 'slow', 'middle', 'slow', 'fast']
    assert {k: len(v) for k, v in times.items()} == dict(slow=3, fast=3, middle=3)
    assert min(times['slow']) > 0.03 and min(times['middle']) > 0.012
    assert spread(times['fast'])['median'] < spread(times['slow'])['min']


@pytest.fixture(scope='module')
def measured():
    # The whole network: the least time of its first exit is less than half of the last's, on a busy machine too.
    torch.manual_seed(0)
    model = timm.create_model('msfuse_cifar').eval()
    return make_engine(model, 'torch'), exit_costs(model)


def test_deeper_exits_take_longer(measured):
    rows = measure_exits(*measured, batch_size=16, rounds=5, passes=3)
    assert [r['exit'] for r in rows] == list(range(1, 8)) and [r['macs'] for r in rows] == list(measured[1].macs)
    assert rows[0]['ms_batch_1']['min'] < rows[6]['ms_batch_1']['min']
    assert rows[0]['images_per_s']['max'] > rows[6]['images_per_s']['max'] > 0.
    for r in rows:
        assert r['ms_batch_1']['min'] <= r['ms_batch_1']['median'] <= r['ms_batch_1']['max']


def test_policies_are_measured_on_the_same_images_as_the_full_network(measured, cifar_root, capsys):
    engine, costs = measured
    test = open_splits('torch/cifar10', cifar_root).test
    images, targets = test.pixels, test.targets
    images, targets = normalize(images[:48], (0.5,) * 3, (0.25,) * 3), targets[:48]
    policies = {'all first': ExitPolicy.at_exit(0, 7), 'none early': ExitPolicy((NEVER,) * 6 + (ALWAYS,), (1.,) * 7)}
    results = measure_policies(engine, costs, policies, images, targets, 16, 5)
    full, first, last = results['full'], *results['policies']
    assert full['average_macs'] == last['average_macs'] == costs.macs[-1] and first['average_macs'] == costs.macs[0]
    assert full['accuracy'] == last['accuracy']
    assert first['exit_shares'] == [1.] + [0.] * 6 and full['heads'] == [7]
    for name in ('batch_1', 'batch_16'):
        assert full[name]['share_of_full_time'] == dict(median=1., min=1., max=1.)
        assert first[name]['share_of_full_time']['min'] < 0.9
        assert first[name]['ms_per_image']['min'] < full[name]['ms_per_image']['min']
    exits = measure_exits(engine, costs, 4, 1, 1)
    print_results(dict(results, model='msfuse_cifar', engine='torch', device='here', threads=1, batch_size=16, rounds=5,
                       exits=exits))
    printed = capsys.readouterr().out
    assert 'share of images per exit, all first: 100%' in printed and '100% 0% 0% 0% 0% 0% 0%' in printed


@needs_weights
def test_the_command_measures_stored_policies_and_files(cifar_root, tmp_path, capsys):
    path = tmp_path / 'policy.json'
    ExitPolicy((2., *(NEVER,) * 5, ALWAYS), (1.,) * 7).save(path)
    args = ['benchmark', 'msfuse_cifar', '--data-dir', cifar_root, '--images', '16', '--batch-size', '8', '--rounds',
            '1', '--engine', 'torch', '--threads', '1', '--policy', str(path), '--average-budget', '32M', '--json',
            '--average-latency', '85%',
            '--output', str(tmp_path / 'report.json')]
    assert main(args) == 0
    results = json.loads(capsys.readouterr().out)
    assert results == json.loads((tmp_path / 'report.json').read_text())
    assert results['engine'] == 'torch' and results['threads'] == 1 and results['images'] == 16
    assert len(results['exits']) == 7
    assert [row['name'] for row in results['policies']] == [str(path), '32.00 M', '85% at batch 1', '85% at batch 8']
    file, stored, *latencies = results['policies']
    assert file['heads'] == [1, 7]
    assert stored['heads'] == [k + 1 for k in load_exit_config('msfuse_cifar').policy_for(32e6).exits_in_use]
    assert all(row['average_macs'] < 64e6 for row in latencies)
    assert 64e6 < results['full']['average_macs'] < 65e6
    assert 0.05 < file['batch_1']['share_of_full_time']['median'] < 1.2


def test_half_of_the_time_is_the_default_and_a_note_where_it_cannot_be_had(monkeypatch, capsys):
    model, config = calibrated_network()
    engine = make_engine(model, 'torch')
    asked = argparse.Namespace(batch_size=8, average_latency=[benchmark.DEFAULT_SHARE])
    monkeypatch.setattr(benchmark, 'measure_profile', lambda *_: StageCosts((1., 1., 1.), (0., 0., 0.)))
    policies = benchmark.latency_policies(asked, config, engine, required=False)
    assert list(policies) == ['50% at batch 1', '50% at batch 8'] and not capsys.readouterr().err
    monkeypatch.setattr(benchmark, 'measure_profile', lambda *_: StageCosts((6., 1., 1.), (0., 0., 0.)))
    assert benchmark.latency_policies(asked, config, engine, required=False) == {}
    assert capsys.readouterr().err.count('note: no policy for 50% of the time') == 2
    with pytest.raises(InputError, match='cannot be kept'):
        benchmark.latency_policies(asked, config, engine)


@needs_weights
@pytest.mark.parametrize('options, words', [
    (['--average-budget', '25M'], 'pass --data-dir'),
    (['--data-dir', '/nowhere'], "cannot be read from '/nowhere'"),
    (['--data-dir', '/nowhere', '--average-budget', '1M'], 'cannot be kept'),
    (['--data-dir', '/nowhere', '--policy', '/nowhere.json'], "policy '/nowhere.json' cannot be read"),
])
def test_options_that_cannot_be_used_are_refused(options, words, capsys):
    assert main(['benchmark', 'msfuse_cifar', *options]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count('\n') == 1


@pytest.mark.parametrize('option, value', [
    ('--images', '0'), ('--batch-size', '0'), ('--rounds', '-1'), ('--threads', '0')])
def test_amounts_start_at_one(option, value, capsys):
    with pytest.raises(SystemExit) as caught:
        main(['benchmark', 'msfuse_cifar', option, value])
    assert caught.value.code == 2
    assert f"argument {option}: '{value}' is not an integer from 1" in capsys.readouterr().err


def test_a_network_without_weights_is_refused(capsys):
    assert main(['benchmark', 'vgg8_mc_cifar.cifar100']) == 2
    assert 'no trained weights' in capsys.readouterr().err
    assert main(['benchmark', 'msfus_cifar']) == 2
    assert 'did you mean msfuse_cifar' in capsys.readouterr().err


def test_a_profile_adds_up_to_the_time_of_the_network(measured):
    engine, costs = measured
    profile = measure_profile(engine, costs.input_size)
    assert len(profile.stages) == len(profile.heads) == 7 and profile.heads[6] == 0.
    runner = measure_exits(engine, costs, 1, 5, passes=3)
    assert profile.full == pytest.approx(runner[6]['ms_batch_1']['median'], rel=0.6)  # other load on the machine
    assert profile.of_exits((0,))[0] < 0.7 * profile.full
