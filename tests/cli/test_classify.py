"""The command line: classify, costs, and what it says to bad input."""
import dataclasses
import json
import re
import statistics
import subprocess
import sys

import pytest
import timm
import torch
from conftest import PROJECT, SAMPLES, SMALL, calibrated_network
from safetensors.torch import save_file

from timm_multiexit import load_exit_config
from timm_multiexit.cli import main
from timm_multiexit.errors import InputError
from timm_multiexit.files import write_json
from timm_multiexit.models._costs import exit_costs
from timm_multiexit.pretrained.load import load_model
from timm_multiexit.pretrained.names import list_networks
from timm_multiexit.pretrained.record import TrainingData, config_of, describe
from timm_multiexit.stopping.config import FILE_NAME
from timm_multiexit.stopping.costs import parse_macs

IMAGES = sorted(map(str, SAMPLES.glob('*.png')))


def answers(capsys, *args):
    """Exit code and parsed JSON of a classify call."""
    code = main(['classify', *args, '--json'])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize('text, value', [('30M', 3e7), ('3e7', 3e7), ('0.03G', 3e7), (' 30 m', 3e7), ('30000000', 3e7)])
def test_macs_parse(text, value):
    assert parse_macs(text) == pytest.approx(value)


@pytest.mark.parametrize('text', ['', 'thirty', '-30M', '0', 'nan', 'inf', '3..0M', '30MB', '1e999'])
def test_macs_that_are_no_number(text):
    with pytest.raises(InputError, match='MACs'):
        parse_macs(text)


def test_shipped_weights_know_the_sample_images(capsys):
    code, results = answers(capsys, *IMAGES)
    assert code == 0 and len(results) == len(IMAGES) >= 5
    right = [r for r in results if r['image'].endswith(f"_{r['label']}.png")]
    assert len(right) >= len(IMAGES) - 2
    for r in results:
        assert [e['exit'] for e in r['exits']] == list(range(1, 8))
        assert r['share_of_full_cost'] == 1. and r['reason'] == 'all exits ran'
        assert all(len(e['top']) == 3 and e['top'][0][1] >= e['top'][1][1] for e in r['exits'])


def test_rows_are_the_network_s_own_logits(capsys):
    _, (result,) = answers(capsys, IMAGES[0], '--uncalibrated')
    model = load_model('msfuse_cifar')
    config = timm.data.resolve_data_config(model=model)
    from PIL import Image
    x = timm.data.create_transform(**config)(Image.open(IMAGES[0]).convert('RGB'))[None]
    with torch.inference_mode():
        exits = model.forward_exits(x)
    for row, logits, macs in zip(result['exits'], exits, exit_costs(model).macs):
        label, probability = row['top'][0]
        assert label == model.pretrained_cfg['label_names'][logits.argmax()]
        assert probability == pytest.approx(float(logits.softmax(1).max()), abs=1e-5) and row['macs'] == macs


@pytest.mark.parametrize('budget, exit_number', [
    ('15.3M', 1), ('30M', 2), ('33.6M', 3), ('64M', 6), ('6.43e7', 7), ('1G', 7)])
def test_deepest_exit_within_the_budget_answers(capsys, budget, exit_number):
    code, results = answers(capsys, *IMAGES, '--budget', budget)
    assert code == 0 and {r['exit'] for r in results} == {exit_number}
    assert all(r['macs'] <= parse_macs(budget) and len(r['exits']) == exit_number for r in results)


def test_a_deadline_is_met_by_the_deepest_exit_that_this_machine_reaches(capsys):
    late, soon = (answers(capsys, IMAGES[0], '--deadline', ms)[1][0] for ms in ('60000ms', '0.001'))
    assert late['exit'] == 7 and late['reason'] == 'last exit, within 60000 ms' and len(late['exits']) == 1
    assert soon['exit'] == 1 and re.fullmatch(r'late: the first exit needs \S+ ms on this machine', soon['reason'])
    for text in ('0ms', 'soon', '-1'):
        assert main(['classify', IMAGES[0], f'--deadline={text}']) == 2
        assert 'write it like 3ms' in capsys.readouterr().err


def test_confidence_stops_at_the_first_exit_that_reaches_it(capsys):
    _, full = answers(capsys, *IMAGES)
    # Whatever the weights: some of the images are this sure at the first exit, and some are not.
    threshold = statistics.median(result['exits'][0]['top'][0][1] for result in full)
    code, early = answers(capsys, *IMAGES, '--confidence', str(threshold))
    assert code == 0
    for all_exits, result in zip(full, early):
        reached = [e['exit'] for e in all_exits['exits'] if e['top'][0][1] >= threshold] or [7]
        assert result['exit'] == reached[0]
        assert ('reaches the threshold' in result['reason']) or result['exit'] == 7
    leave_first = [r['exit'] == 1 for r in early]
    assert any(leave_first) and not all(leave_first)


def test_average_budget_uses_the_stored_thresholds(capsys):
    code, results = answers(capsys, *IMAGES, '--average-budget', '25M')
    assert code == 0 and results[0]['exit'] < 7
    assert main(['classify', IMAGES[0], '--average-budget', '3M']) == 2


def test_classes_are_named_as_in_the_exit_config(capsys, tmp_path):
    config = load_exit_config('msfuse_cifar')
    file = tmp_path / 'mine.json'
    dataclasses.replace(config, class_names=tuple(f'kind {i}' for i in range(10))).save(file)
    assert main(['classify', IMAGES[0], '--average-budget', '25M', '--exit-config', str(file)]) == 0
    assert re.search(r'-> kind \d', capsys.readouterr().out)


def test_average_latency_runs_the_exits_that_its_policy_uses(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    code = main(['classify', *IMAGES, '--average-latency', '75%', '--engine', 'torch', '--json'])
    printed = capsys.readouterr()
    results = json.loads(printed.out)
    expected, full = map(float, re.search(
        r'expected: ([\d.]+) ms per image on average, ([\d.]+) ms for the full network, by', printed.err).groups())
    assert 0. < expected < full
    (kept,) = (tmp_path / 'timm-multiexit' / 'profiles').iterdir()
    measured = kept.read_text()
    tried = [[k + 1 for k in json.loads(key)[0]] for key in json.loads(measured)['policies_ms']]
    assert code == 0 and any(r['exit'] < 7 for r in results)
    ran = [[e['exit'] for e in result['exits']] for result in results]
    assert any(all(row == used[:len(row)] and row[-1] in used for row in ran) for used in tried)
    again = answers(capsys, *IMAGES, '--average-latency', '75%', '--engine', 'torch')[1]
    assert [[e['exit'] for e in result['exits']] for result in again] == ran
    assert kept.read_text() == measured  # so nothing was measured twice
    for wrong in ('50 %x', '-1ms', '0%', '1000%'):
        assert main(['classify', IMAGES[0], f'--average-latency={wrong}', '--engine', 'torch']) == 2
    assert list((tmp_path / 'timm-multiexit' / 'profiles').iterdir()) == [kept]
    kept.unlink()
    assert main(['classify', IMAGES[0], '--average-latency', 'soon']) == 2 and not list(kept.parent.iterdir())


def test_costs_and_times_of_weights_on_a_backbone(tmp_path, capsys, monkeypatch):
    """Of that backbone and its size of images, where the last map is a single pixel."""
    model = timm.create_model('multiexit', backbone='resnet10t', at=1, num_classes=4)
    describe(model, TrainingData('folder'), list('abcd'), input_size=(3, 32, 32))
    save_file(model.state_dict(), tmp_path / 'model.safetensors')
    write_json(tmp_path / 'config.json', config_of(model))
    assert main(['costs', '--checkpoint', str(tmp_path), '--json']) == 0
    printed = capsys.readouterr()
    costs = json.loads(printed.out)
    assert costs['num_classes'] == 4 and costs['input_size'] == [3, 32, 32] and 'Traceback' not in printed.err
    assert costs['macs'] == list(exit_costs(model.train()).macs) and costs['macs'][-1] < 50e6
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    assert main(['profile', '--checkpoint', str(tmp_path), '--engine', 'torch', '--json']) == 0
    assert len(json.loads(capsys.readouterr().out)['stages_ms']) == 2


def test_probabilities_are_calibrated_unless_asked_otherwise(capsys):
    stored, raw = (answers(capsys, IMAGES[0], *options)[1][0]['exits'][0]['top'][0][1]
                   for options in ([], ['--uncalibrated']))
    assert 0.3 < stored < raw


def test_table_says_where_and_why_it_stopped(capsys):
    assert main(['classify', IMAGES[0], '--budget', '30M']) == 0
    out = capsys.readouterr().out
    assert IMAGES[0] in out and '15.26 M' in out and 'from exit 2 of 7' in out
    assert 'the next exit needs 33.58 M, the budget is 30.00 M' in out and '36% of the full cost' in out


def test_other_images_are_still_answered(capsys, tmp_path):
    (tmp_path / 'bad.png').write_text('no image')
    code = main(['classify', str(tmp_path / 'bad.png'), IMAGES[0], str(tmp_path / 'none*.png'), '--json'])
    out, err = capsys.readouterr()
    results = json.loads(out)
    assert code == 2 and [('error' in r) for r in results] == [True, False, True]
    lines = err.strip().splitlines()
    assert len(lines) == 2 and 'bad.png' in lines[0] and 'matches no file' in lines[1]


def test_folders_and_quoted_patterns(capsys, tmp_path):
    """As a shell would expand them, where the shell does not."""
    (tmp_path / 'deep').mkdir()
    (tmp_path / '.ipynb_checkpoints').mkdir()
    (tmp_path / '[a].png').write_bytes(SAMPLES.joinpath(IMAGES[0]).read_bytes())
    for name in ('b.png', 'c.png', '._b.png', 'notes.txt', 'deep/d.jpg', '.ipynb_checkpoints/b.png'):
        (tmp_path / name).write_bytes((tmp_path / '[a].png').read_bytes())
    for given, names in [
        (tmp_path, '[a].png b.png c.png deep/d.jpg'), (tmp_path / '?.png', 'b.png c.png'),
        (tmp_path / '[a].png', '[a].png'), (tmp_path / '**' / '*.jpg', 'deep/d.jpg'),
    ]:
        code, results = answers(capsys, str(given), '--budget', '16M')
        assert code == 0 and [r['image'] for r in results] == [str(tmp_path / n) for n in names.split()]
    (tmp_path / 'empty').mkdir()
    assert main(['classify', str(tmp_path / 'empty')]) == 2
    assert 'holds no images' in capsys.readouterr().err


def checkpoint(tmp_path, **kwargs):
    path = tmp_path / 'weights.safetensors'
    save_file(timm.create_model('msfuse_cifar', **kwargs).state_dict(), path)
    return path


def cut_checkpoint(tmp_path):
    path = checkpoint(tmp_path)
    path.write_bytes(path.read_bytes()[:1000])
    return path


@pytest.mark.parametrize('args, message', [
    (['--budget', '3M'], '15.26 M'),
    (['--budget', 'many'], "'many' is not a number of MACs"),
    (['--budget', '30'], 'did you mean 30M?'),
    (['--confidence', '1.5'], 'above 0 and up to 1'),
    (['--confidence', 'nan'], 'above 0 and up to 1'),
    (['--model', 'msfuse_cifr'], 'did you mean msfuse_cifar'),
    (['--model', 'resnet18'], 'has no exits'),
    (['--model', 'msfuse_cifar.imagenet'], 'choose one of cifar10, cifar100'),
    (['--model', 'local-dir:no/such/folder'], 'no/such/folder'),
    (['--checkpoint', 'no.safetensors'], "'no.safetensors' is not a file"),
])
def test_bad_options_are_one_line_and_code_2(capsys, args, message):
    assert main(['classify', IMAGES[0], *args]) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.strip().splitlines()) == 1


def test_checkpoints_that_do_not_fit_or_are_damaged(capsys, tmp_path):
    classify = ['classify', IMAGES[0], '--model', 'msfuse_cifar', '--checkpoint']
    assert main([*classify, str(checkpoint(tmp_path, **SMALL))]) == 2
    assert 'does not fit msfuse_cifar with 10 classes' in capsys.readouterr().err
    assert main([*classify, str(cut_checkpoint(tmp_path))]) == 2
    err = capsys.readouterr().err
    assert 'cannot be read' in err and len(err.strip().splitlines()) == 1


def test_temperatures_that_are_missing_or_of_other_weights(capsys, tmp_path):
    model, config = calibrated_network()
    describe(model, TrainingData('folder'), config.class_names)
    save_file(model.state_dict(), tmp_path / 'model.safetensors')
    write_json(tmp_path / 'config.json', config_of(model))
    classify = ['classify', IMAGES[0], '--checkpoint', str(tmp_path)]
    for options, notes in (['--confidence', '0.9'], 1), (['--confidence', '0.9', '--uncalibrated'], 0), ([], 0):
        assert main([*classify, *options]) == 0
        err = capsys.readouterr().err
        assert err.count('note: no temperatures are stored') == len(err.splitlines()) == notes
    dataclasses.replace(config, weights='others').save(tmp_path / FILE_NAME)
    for options in ([], ['--confidence', '0.9'], ['--average-budget', '1M']):
        assert main([*classify, *options]) == 2
        err = capsys.readouterr().err
        assert 'of other weights than these' in err and len(err.splitlines()) == 1


def test_network_without_weights_says_which_have_some(capsys):
    trained = {name.partition('.')[0] for name in list_networks(pretrained=True)}
    untrained = [name for name in list_networks() if name not in trained]
    if not untrained:
        pytest.skip('every network has weights')
    assert main(['classify', IMAGES[0], '--model', untrained[0]]) == 2
    err = capsys.readouterr().err
    assert 'no trained weights' in err and 'msfuse_cifar.cifar10' in err


def test_costs_table_and_json(capsys):
    assert main(['costs', 'msfuse_cifar']) == 0
    out = capsys.readouterr().out
    for figure in ('15.26', '23.32', '33.58', '40.65', '49.05', '57.60', '64.22', '5,051,958'):
        assert figure in out
    assert main(['costs', 'msfuse_cifar', '--input-size', '3', '64', '64', '--json']) == 0
    assert json.loads(capsys.readouterr().out)['macs'][0] > 4 * 15e6 * 0.99


def test_timm_scripts_find_the_networks(tmp_path):
    """`python -m timm_multiexit SCRIPT` is how timm's own scripts get to know the package."""
    script = tmp_path / 'script.py'
    script.write_text('import sys, timm\nprint(timm.create_model(sys.argv[1]).num_exits)\n')
    run = [sys.executable, '-m', 'timm_multiexit']
    done = subprocess.run([*run, str(script), 'msfuse_cifar'], capture_output=True, text=True, cwd=PROJECT)
    assert done.returncode == 0 and done.stdout.strip() == '7'
    done = subprocess.run([*run, 'no_such_script.py'], capture_output=True, text=True, cwd=PROJECT)
    assert done.returncode == 1 and "'no_such_script.py' is not a file" in done.stderr
