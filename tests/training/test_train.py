"""train_timm.py as a user runs it: learning, bit-exact resume after a kill, several processes, history, bad options."""
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from conftest import PROJECT
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import pil_to_tensor
from training_support import SCRIPT, run_training

from timm_multiexit.data.splits import open_splits
from timm_multiexit.datasets import DATASETS, normalize
from timm_multiexit.errors import InputError
from timm_multiexit.files import sha256
from timm_multiexit.models._pretrained import WEIGHTS_DIR
from timm_multiexit.training.history import History, Parent, Step, initial_history
from timm_multiexit.training.options import parse_train_args
from timm_multiexit.training.run import train as run
from timm_multiexit.training.trainer import Trainer

pytest_plugins = ['training_support']  # folder_dataset


def command(data: Path, output: Path, *extra: str, epochs: int = 3):
    return [
        sys.executable, SCRIPT, '--data-dir', str(data), '--dataset', 'folder', '--output', str(output),
        '--experiment', 'run', '--model-kwargs', 'steps=(1,1,1)', 'base_width=8', 'growth=4', 'head_width=16',
        '--num-classes', '2', '--batch-size', '40', '--validation-images', '40', '--epochs', str(epochs),
        '--model-ema', '--model-ema-decay', '0.9', '--mixup', '0.2', '--cutmix', '0.5', '--reprob', '0.25', '--aa',
        'rand-m5-n1', '--drop', '0.1', '--threads', '1', '--log-interval', '1', '--device', 'cpu', *extra]


def train(data: Path, output: Path, *extra: str, **kwargs) -> str:
    output.mkdir(exist_ok=True)
    status, log = run_training(command(data, output, *extra, **kwargs)[2:], output / 'log')
    assert status == 0, log
    return log


def weights(output: Path):
    checkpoint = torch.load(output / 'run' / 'last.pth.tar', map_location='cpu', weights_only=False)
    return {**{k: v for k, v in checkpoint['state_dict'].items()},
            **{f'ema.{k}': v for k, v in checkpoint['state_dict_ema'].items()}}


def rows(output: Path):
    with open(output / 'run' / 'summary.csv', newline='') as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope='module')
def uninterrupted(folder_dataset, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp('whole')
    train(folder_dataset, output)
    return output


def test_run_writes_summary_and_final_weights(uninterrupted):
    table = rows(uninterrupted)
    assert [r['epoch'] for r in table] == ['0', '1', '2']
    assert {f'eval_top1_exit{k}' for k in (1, 2, 3)} <= set(table[0])
    assert all(0 <= float(r['eval_top1_exit3']) <= 100 for r in table)
    assert float(table[-1]['train_loss']) < float(table[0]['train_loss'])
    final = uninterrupted / 'run' / 'final'
    state = load_file(final / 'model.safetensors')
    model = timm.create_model('msfuse_cifar', num_classes=2, steps=(1, 1, 1), base_width=8, growth=4, head_width=16)
    model.load_state_dict(state)
    assert state['stages.0.layers.0.conv1.conv.weight'].dtype == torch.float16
    recipe = yaml.safe_load((final / 'recipe.yaml').read_text())
    assert recipe['epochs'] == 3 and recipe['model'] == 'msfuse_cifar.cifar10' and 'data_dir' not in recipe


def test_killed_run_resumes_bit_exactly(uninterrupted, folder_dataset, tmp_path):
    process = subprocess.Popen(
        command(folder_dataset, tmp_path), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=PROJECT)
    for line in process.stderr:
        if 'Train: 1 [   4/' in line:  # in the middle of the second epoch
            os.kill(process.pid, signal.SIGKILL)
            break
    process.stderr.read()
    assert process.wait() == -signal.SIGKILL
    assert len(rows(tmp_path)) == 1
    (begun,) = History.read(tmp_path / 'run').steps
    train(folder_dataset, tmp_path, '--resume', 'auto')
    (ended,) = History.read(tmp_path / 'run' / 'final').steps
    assert begun.run == ended.run and not begun.reached and ended.reached
    expected, resumed = weights(uninterrupted), weights(tmp_path)
    assert expected.keys() == resumed.keys()
    assert [k for k in expected if not torch.equal(expected[k], resumed[k])] == []
    strip = [{k: v for k, v in r.items() if k != 'train_images_per_s'} for r in rows(tmp_path)]
    assert strip == [{k: v for k, v in r.items() if k != 'train_images_per_s'} for r in rows(uninterrupted)]


def test_a_run_records_its_parents(uninterrupted, folder_dataset, tmp_path):
    start = uninterrupted / 'run' / 'final'
    train(folder_dataset, tmp_path, '--initial-checkpoint', str(start / 'model.safetensors'), '--lr', '0', epochs=1)
    final = tmp_path / 'run' / 'final'
    assert {p.name for p in final.iterdir()} == {
        'config.json', 'history.csv', 'history.yaml', 'model.safetensors', 'recipe.yaml'}
    (first,), log = History.read(start).steps, History.read(start).log
    assert first.parents == [] and first.options['epochs'] == 3 and first.sha256 == sha256(start / 'model.safetensors')
    assert first.reached == {k[5:]: float(v) for k, v in rows(uninterrupted)[-1].items() if k.startswith('eval_')}
    assert log == [{'run': first.run, **row} for row in rows(uninterrupted)]
    history = History.read(final)
    assert history.steps[0] == first and [row['run'] for row in history.log] == 3 * [first.run] + [history.steps[1].run]
    assert history.steps[1].parents == [Parent('model.safetensors', first.run, sha256=first.sha256)]
    assert history.steps[1].run != first.run and history.steps[1].options['lr'] == 0
    # A third run carries both on; a checkpoint of the second, an earlier epoch, can be a parent too.
    train(folder_dataset, tmp_path / 'third', '--initial-checkpoint', str(final / 'model.safetensors'),
          str(tmp_path / 'run' / 'last.pth.tar'), epochs=1)
    third = History.read(tmp_path / 'third' / 'run' / 'final')
    assert third.steps[:2] == history.steps and len(third.steps) == 3 and third.log[:4] == history.log
    assert [(parent.file, parent.run, parent.epoch) for parent in third.steps[2].parents] == [
        ('model.safetensors', history.steps[1].run, None), ('last.pth.tar', history.steps[1].run, 0)]
    # Other weights beside a history are not attributed to its run.
    shutil.copytree(start, tmp_path / 'moved')
    other = tmp_path / 'moved' / 'other.safetensors'
    save_file(load_file(final / 'model.safetensors'), other)
    unknown = initial_history([other], 'new')
    assert unknown == History([Step('new', [Parent('other.safetensors', sha256=sha256(other))])])
    # The run did start from these weights: with a rate of 0 they are unchanged.
    name = 'stages.2.layers.0.'
    before, after = load_file(start / 'model.safetensors'), load_file(final / 'model.safetensors')
    same = [k for k in before if k.startswith(name) and k.endswith('weight')]
    assert same and all(torch.allclose(before[k].float(), after[k].float(), atol=1e-3) for k in same)


def test_mean_of_two_runs_gets_new_bn_statistics(uninterrupted, folder_dataset, tmp_path):
    first = uninterrupted / 'run' / 'final'
    train(folder_dataset, tmp_path / 'second', '--initial-checkpoint', str(first / 'model.safetensors'), epochs=2)
    second = tmp_path / 'second' / 'run' / 'final'
    log = train(folder_dataset, tmp_path, '--initial-checkpoint', str(first / 'model.safetensors'),
                str(second / 'model.safetensors'), '--update-bn', '--aa', '', '--reprob', '0',
                '--crop-padding', '0', '--hflip', 'none', '--mixup', '0', '--cutmix', '0', epochs=0)
    final = tmp_path / 'run' / 'final'
    a, b, mean = (load_file(folder / 'model.safetensors') for folder in (first, second, final))
    statistics = [k for k in mean if k.endswith(('running_mean', 'running_var'))]
    weights = [k for k in mean if k not in statistics and mean[k].is_floating_point()]
    assert all(torch.allclose(mean[k].float(), (a[k].float() + b[k].float()) / 2, rtol=2e-3, atol=1e-4)
               for k in weights)
    assert any(not torch.equal(a[k], b[k]) for k in weights)
    assert all(mean[k] == 10 for k in mean if k.endswith('num_batches_tracked'))  # 400 images in batches of 40
    # Mean and deviation of the images stay those of the first run. The first layer's statistics can be computed.
    cfg, start = (json.loads((folder / 'config.json').read_text())['pretrained_cfg'] for folder in (final, first))
    assert cfg['mean'] == start['mean'] != list(DATASETS['cifar10'].mean) and cfg['std'] == start['std']
    model = timm.create_model('msfuse_cifar.cifar10', num_classes=2, steps=(1, 1, 1), base_width=8, growth=4,
                              head_width=16)
    model.load_state_dict({k: v.float() for k, v in mean.items()})
    files = open_splits('folder', folder_dataset, development=40).train.sources
    images = torch.stack([pil_to_tensor(Image.open(f)) for f in files])
    x = normalize(images, cfg['mean'], cfg['std'])
    conv, norm = next((c, n) for c, n in zip(model.modules(), list(model.modules())[1:])
                      if isinstance(c, torch.nn.Conv2d) and isinstance(n, torch.nn.BatchNorm2d))
    seen = []
    conv.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    model.eval()(x)
    expected = seen[0].mean((0, 2, 3))
    assert (norm.running_mean - expected).abs().max() < 1e-4 * seen[0].std()
    assert (norm.running_mean - expected).norm() < (
        (a[name_of(model, norm)].float() + b[name_of(model, norm)].float()) / 2 - expected).norm()
    (row,) = rows(tmp_path)
    line = ' '.join(f"{float(row[f'eval_top1_exit{k}']):.2f}" for k in (1, 2, 3))
    assert f'With new BN statistics: top-1 per exit {line}' in log
    runs = [History.read(folder).steps[-1].run for folder in (first, second, final)]
    assert [step.run for step in History.read(final).steps] == runs
    assert [parent.run for parent in History.read(final).steps[-1].parents] == runs[:2]
    # A mean of weights with common ancestors lists each run once.
    train(folder_dataset, tmp_path / 'both', '--initial-checkpoint',
          *(str(folder / 'model.safetensors') for folder in (first, second, final)), '--update-bn', epochs=0)
    both = History.read(tmp_path / 'both' / 'run' / 'final')
    assert [step.run for step in both.steps[:-1]] == runs
    assert [parent.run for parent in both.steps[-1].parents] == runs
    assert [row['run'] for row in both.log] == 3 * [runs[0]] + 2 * [runs[1]] + [runs[2], both.steps[-1].run]


def name_of(model, norm) -> str:
    return next(f'{name}.running_mean' for name, module in model.named_modules() if module is norm)


def test_two_processes(folder_dataset, tmp_path):
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']
    done = subprocess.run(
        launch + command(folder_dataset, tmp_path, '--batch-size', '20', epochs=2)[1:],
        capture_output=True, text=True, cwd=PROJECT, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr
    table = rows(tmp_path)
    assert len(table) == 2
    assert len([line for line in done.stderr.splitlines() if line.startswith('Train: 1 [   1/')]) == 1
    # Accuracies are over all 40 held-out images, each counted once.
    assert all(float(r['eval_top1_exit1']) * 40 / 100 == pytest.approx(round(float(r['eval_top1_exit1']) * .4), abs=.01)
               for r in table)


def test_warning_about_another_number_of_processes(folder_dataset, tmp_path, caplog, monkeypatch):
    """--batch-size is per process: with one process the total batch would be half of the intended one."""
    recipe = tmp_path / 'two.yaml'
    recipe.write_text('world_size: 2\n')
    out = train(folder_dataset, tmp_path, '--config', str(recipe), epochs=1)
    assert 'for 2 processes of 40 images each, this run has 1: start it with torchrun --nproc_per_node 2' in out
    written = yaml.safe_load((tmp_path / 'run' / 'recipe.yaml').read_text())
    assert (written['world_size'], written['batch_size']) == (1, 40)
    monkeypatch.setattr(torch, 'set_num_threads', lambda n: None)  # it would hold for later tests
    Trainer(parse_train_args('', command(folder_dataset, tmp_path, '--world-size', '1')[2:]))
    assert 'processes of' not in caplog.text
    Trainer(parse_train_args('', command(folder_dataset, tmp_path, '--config', str(recipe))[2:]))
    assert 'processes of' in caplog.text


def test_timm_pipeline_and_distillation(folder_dataset, tmp_path):
    out = train(folder_dataset, tmp_path, '--loader', 'timm', '--workers', '0', '--distill-weight', '0.5',
                '--exit-weights', '1', '2', '3', '--amp', '--channels-last', epochs=1)
    assert 'Final weights' in out


@pytest.mark.parametrize('names, files', [('a', 'b'), ('[a, b]', '[c, d]'), ("''", "''"), ('[a, b]', "''")])
def test_one_or_several_teachers_in_a_recipe(tmp_path, names, files):
    (tmp_path / 'r.yaml').write_text(f'kd_model_name: {names}\nkd_checkpoint: {files}\n')
    args = parse_train_args('', ['--config', str(tmp_path / 'r.yaml')])
    for value, given in ((args.kd_model_name, names), (args.kd_checkpoint, files)):
        expected = yaml.safe_load(given)
        assert value == (expected if isinstance(expected, list) else [expected] if expected else [])


def test_checkpoints_for_all_teachers_or_none(capsys):
    with pytest.raises(SystemExit):
        parse_train_args('', ['--kd-model-name', 'msfuse_cifar', 'resnet18', '--kd-checkpoint', 'a.safetensors'])
    assert '1 --kd-checkpoint for 2 --kd-model-name: give a file for each' in capsys.readouterr().err


def test_teacher_from_a_file(folder_dataset, tmp_path):
    teacher = timm.create_model('msfuse_cifar', num_classes=2)
    save_file(teacher.state_dict(), tmp_path / 'teacher.safetensors')
    options = ['--kd-model-name', 'msfuse_cifar.cifar10', '--kd-checkpoint', str(tmp_path / 'teacher.safetensors')]
    train(folder_dataset, tmp_path, *options, epochs=1)
    distilled = weights(tmp_path)
    recipe = yaml.safe_load((tmp_path / 'run' / 'final' / 'recipe.yaml').read_text())
    assert recipe['kd_model_name'] == ['msfuse_cifar.cifar10'] and recipe['task_loss_weight'] == 0.5
    train(folder_dataset, tmp_path / 'alone', epochs=1)
    alone = weights(tmp_path / 'alone')
    assert distilled.keys() == alone.keys() and any(not torch.equal(distilled[k], alone[k]) for k in alone)


def test_teacher_of_other_widths(folder_dataset, tmp_path):
    widths = dict(stem_width=4, widths=(4, 8), depth=3)
    teacher = timm.create_model('vgg8_mc_cifar', num_classes=2, **widths)
    save_file(teacher.state_dict(), tmp_path / 'teacher.safetensors')
    options = ['--kd-model-name', 'vgg8_mc_cifar.cifar10', '--kd-checkpoint', str(tmp_path / 'teacher.safetensors'),
               '--kd-model-kwargs', *(f'{k}={v}'.replace(' ', '') for k, v in widths.items())]
    train(folder_dataset, tmp_path, *options, epochs=1)
    recipe = yaml.safe_load((tmp_path / 'run' / 'final' / 'recipe.yaml').read_text())
    assert recipe['kd_model_kwargs'] == {'stem_width': 4, 'widths': [4, 8], 'depth': 3}


def test_evaluations_and_checkpoints_at_intervals(folder_dataset, tmp_path):
    out = train(folder_dataset, tmp_path, '--eval-interval', '3', '--checkpoint-interval', '2', epochs=5)
    table = rows(tmp_path)
    assert [r['epoch'] for r in table] == ['0', '1', '2', '3', '4'] and None not in table[2]
    assert [r['eval_top1_mean'] != '' for r in table] == [False, False, True, False, True]
    assert sorted(table[0]) == sorted(table[4]) and float(table[4]['eval_top1_exit1']) >= 0
    assert [f'checkpoint-{k}.pth.tar' in out for k in range(5)] == [False, True, False, True, True]


def test_frozen_stem(folder_dataset, tmp_path):
    initial = timm.create_model('msfuse_cifar', num_classes=2, steps=(1, 1, 1), base_width=8, growth=4, head_width=16)
    save_file(initial.state_dict(), tmp_path / 'initial.safetensors')
    train(folder_dataset, tmp_path, '--initial-checkpoint', str(tmp_path / 'initial.safetensors'), '--freeze',
          'stages.0.layers.0', epochs=1)
    state = load_file(tmp_path / 'run' / 'final' / 'model.safetensors')
    for name, value in initial.state_dict().items():
        frozen = name.startswith('stages.0.layers.0.')  # these are not rounded to half precision
        assert torch.equal(state[name].float(), value.float() if frozen else value.half().float()) == frozen, name


def test_benchmark_prints_both_rates(folder_dataset, tmp_path):
    out = train(folder_dataset, tmp_path, '--benchmark', '3')
    assert 'bare step on one fixed batch' in out and 'real loop' in out


@pytest.mark.parametrize('extra, message', [
    (['--exit-weights', '1', '2'], 'exit weights'),
    (['--model', 'resnet18'], 'has no exits'),
    (['--resume', 'README.md'], 'cannot resume'),
    (['--kd-model-name', 'msfuse_cifar.cifar10'], 'the teacher has 10 classes and the network 2'),
    (['--kd-model-name', 'msfuse'], "choose one of timm's networks"),
    (['--kd-model-name', 'msfuse_cifar.cifar10', '--kd-model-kwargs', 'size=3'], "'size'"),
    (['--kd-model-name', 'vgg8_mc_cifar.cifar10'], 'no trained weights'),
    (['--kd-model-name', 'msfuse_cifar', '--kd-checkpoint', 'none.pt'], "checkpoint 'none.pt' is not a file"),
    (['--freeze', 'stem'], "cannot freeze 'stem'"),
    (['--batch-size', '5000'], 'smaller --batch-size'),
    (['--validation-images', '440'], 'hold out fewer'),
])
def test_bad_options(folder_dataset, tmp_path, monkeypatch, extra, message):
    monkeypatch.chdir(PROJECT)
    monkeypatch.setattr(torch, 'set_num_threads', lambda n: None)  # it would hold for later tests
    argv = command(folder_dataset, tmp_path, *extra)[2:]
    if 'resnet18' in extra:
        i = argv.index('--model-kwargs')
        del argv[i:i + 5]
    with pytest.raises(InputError, match=message) as raised:
        run(parse_train_args('', argv))
    assert '\n' not in str(raised.value)


def test_input_errors_are_one_line(folder_dataset, tmp_path):
    done = subprocess.run(command(folder_dataset, tmp_path, '--freeze', 'stem'), capture_output=True, text=True)
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("train_timm.py: error: cannot freeze 'stem'")


def test_unknown_option_in_a_config(tmp_path, capsys):
    (tmp_path / 'bad.yaml').write_text('learning_rate: 1\n')
    with pytest.raises(SystemExit) as stopped:
        parse_train_args('', ['--config', str(tmp_path / 'bad.yaml')])
    assert stopped.value.code == 2 and 'learning_rate' in capsys.readouterr().err


@pytest.mark.parametrize('extra', [[], ['--update-bn'], ['--initial-checkpoint', 'model.safetensors']])
def test_zero_epochs_need_weights_to_export(capsys, extra):
    with pytest.raises(SystemExit):
        parse_train_args('', ['--epochs', '0', *extra])
    assert '--epochs 0 trains nothing' in capsys.readouterr().err


def test_history_of_the_shipped_weights():
    for folder in sorted(WEIGHTS_DIR.iterdir()):
        history, recipe = History.read(folder), yaml.safe_load((folder / 'recipe.yaml').read_text())
        last = history.steps[-1]
        assert last.sha256 == sha256(folder / 'model.safetensors')
        assert len(last.parents) == len(recipe.pop('initial_checkpoint')) and recipe.items() <= last.options.items()
        runs = [step.run for step in history.steps]
        assert len(set(runs)) == len(runs) and list(dict.fromkeys(row['run'] for row in history.log)) == runs
        for k, step in enumerate(history.steps):
            assert {parent.run for parent in step.parents} <= set(runs[:k]) and bool(step.parents) == bool(k)
            log = [row for row in history.log if row['run'] == step.run]
            assert len(log) == max(step.options['epochs'], 1)
            assert {name: float(log[-1][f'eval_{name}']) for name in step.reached} == step.reached
