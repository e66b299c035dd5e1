"""Kills, full disks, other settings and other processes: a run loses no finished epoch and is never mixed with another.

Faults are made here; `killer.Killer` dies before the k-th operation on files.
"""
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import PROJECT
from killer import Killer
from safetensors.torch import load_file

from timm_multiexit.commands import Interruptions
from timm_multiexit.errors import InputError
from timm_multiexit.files import held
from timm_multiexit.training.history import History, read_rows
from timm_multiexit.training.options import parse_train_args
from timm_multiexit.training.run import _check_classes, train
from timm_multiexit.training.run_folder import (
    RunFolder,
    changed_options,
    check_kept,
    find_checkpoint,
    is_finished,
    read_checkpoint,
)
from timm_multiexit.training.trainer import Trainer

pytest_plugins = ['training_support']  # folder_dataset
pytestmark = pytest.mark.usefixtures('one_thread')


def arguments(data: Path, output: Path, *extra: str):
    return [
        '--data-dir', str(data), '--dataset', 'folder', '--output', str(output), '--experiment', 'run',
        '--model-kwargs', 'steps=(1,1,1)', 'base_width=4', 'growth=2', 'head_width=4', '--num-classes', '2',
        '--batch-size', '100', '--validation-images', '40', '--epochs', '3', '--model-ema', '--threads', '1',
        '--device', 'cpu', *extra]


def options(*args: object):
    return parse_train_args('', arguments(*args))


@pytest.fixture(scope='module')
def trainer(folder_dataset, tmp_path_factory, one_thread):
    return Trainer(options(folder_dataset, tmp_path_factory.mktemp('output')))


ACCURACY = (50., 70., 60.)  # the second epoch is the best


def record(trainer: Trainer, path: Path) -> None:
    """A run's work on its files, with an epoch's number in the place of what it would have learned."""
    checkpoint = find_checkpoint('auto', path)
    saved = read_checkpoint(checkpoint) if checkpoint else {}
    if saved and is_finished(path, saved, 3):
        return
    start = saved['epoch'] + 1 if saved else 0
    folder = RunFolder(trainer, path, checkpoint, start, {})
    module = trainer.task.get_trainable_module(ema=True).module
    if saved:
        module.load_state_dict(saved['state_dict_ema'])
    for epoch in range(start, 3):
        next(module.parameters()).data.fill_(epoch)
        metrics = dict.fromkeys(trainer.metrics, ACCURACY[epoch])
        folder.end_epoch(epoch, {'loss': 1.}, metrics)
    folder.export()


def contents(path: Path):
    """What each file of a run says."""
    def epoch(file):
        checkpoint = read_checkpoint(str(path / file))
        assert next(iter(checkpoint['state_dict_ema'].values())).unique().tolist() == [checkpoint['epoch']]
        return checkpoint['epoch'], checkpoint['saver']['best_epoch']

    (step,) = History.read(path / 'final').steps
    found = {file.name: epoch(file.name) for file in path.glob('*.pth.tar')}
    final = load_file(path / 'final' / 'model.safetensors')
    return (found, (path / 'summary.csv').read_text(), (path / 'recipe.yaml').read_text(),
            next(iter(final.values())).unique().tolist(), step.reached, sorted(p.name for p in path.rglob('*')))


@pytest.mark.parametrize('every', [8, pytest.param(1, marks=pytest.mark.slow('40 s of CPU time: about 70 runs'))])
def test_a_kill_before_any_operation_on_files_loses_nothing(trainer, tmp_path, every):
    with Killer(tmp_path) as operations:
        (tmp_path / 'whole').mkdir()
        record(trainer, tmp_path / 'whole')
    whole = contents(tmp_path / 'whole')
    assert whole[0] == {'last.pth.tar': (2, 1), 'checkpoint-1.pth.tar': (1, 0), 'model_best.pth.tar': (1, 0)}
    assert len(operations.done) > 40
    for k in range(1, len(operations.done), every):
        path = tmp_path / 'killed'
        with Killer(tmp_path, k):
            path.mkdir()
            record(trainer, path)
        epochs = read_checkpoint(str(path / 'last.pth.tar'))['epoch'] if (path / 'last.pth.tar').exists() else -1
        renamed = [done[2] for done in operations.done[:k] if done[0] == 'os.rename']
        finished = [name for name in renamed if name.endswith('/last.pth.tar')]
        assert epochs == len(finished) - 1, operations.done[k]
        assert not (path / 'final').exists() or (path / 'final' / 'config.json').exists()
        with held(path):  # clears what the killed process left half written
            record(trainer, path)
        (path / '.lock').unlink()
        assert contents(path) == whole, f'killed before {operations.done[k]}'
        shutil.rmtree(path)


def test_a_used_folder_is_not_started_anew(trainer, tmp_path):
    record(trainer, tmp_path)
    with pytest.raises(InputError, match='holds a run .*add --resume auto'):
        find_checkpoint('', tmp_path)
    assert find_checkpoint(str(tmp_path / 'checkpoint-1.pth.tar'), tmp_path)
    with pytest.raises(InputError, match='holds a run'):
        find_checkpoint(str(tmp_path.parent / 'other.pth.tar'), tmp_path)
    (tmp_path / 'last.pth.tar').unlink()
    with pytest.raises(InputError, match='no checkpoint to resume from'):
        find_checkpoint('auto', tmp_path)
    for old in tmp_path.glob('*.tar'):
        old.unlink()
    (tmp_path / 'final').rename(tmp_path / 'final.1')
    with pytest.raises(InputError, match='holds a run .final.1'):
        find_checkpoint('', tmp_path)
    assert find_checkpoint('auto', tmp_path / 'new') == find_checkpoint('', tmp_path / 'new') == ''



def test_overwrite_replaces_the_run(trainer, tmp_path, capsys):
    record(trainer, tmp_path)
    (tmp_path / 'final-backbone').mkdir()  # of `detach`
    assert find_checkpoint('', tmp_path, overwrite=True) == ''
    (first,) = History.read(tmp_path).steps
    RunFolder(trainer, tmp_path, '', 0, {})
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir() or p.suffix == '.tar') == ['final-backbone']
    (second,) = History.read(tmp_path).steps
    assert second.run != first.run
    with pytest.raises(SystemExit):
        parse_train_args('', ['--overwrite', '--resume', 'auto'])
    assert 'choose one' in capsys.readouterr().err


def test_overwrite_keeps_what_the_run_starts_from(trainer, folder_dataset, tmp_path):
    record(trainer, tmp_path / 'run')
    args = options(folder_dataset, tmp_path, '--overwrite', '--initial-checkpoint', str(tmp_path / 'run' / 'final'))
    with pytest.raises(InputError, match='--overwrite would delete .*final/model.safetensors'):
        train(args)
    assert (tmp_path / 'run' / 'final' / 'model.safetensors').exists()
    check_kept(tmp_path / 'run', ['', str(folder_dataset)])


def test_a_run_of_renamed_classes_is_not_resumed(trainer, tmp_path):
    record(trainer, tmp_path)
    path = tmp_path / 'config.json'
    _check_classes(trainer, path)
    names = list(trainer.config['label_names'])
    path.write_text(path.read_text().replace(names[-1], 'renamed'))
    with pytest.raises(InputError, match='the classes are not those of the run to resume'):
        _check_classes(trainer, path)


def test_a_run_goes_on_from_an_earlier_checkpoint(trainer, tmp_path):
    record(trainer, tmp_path)
    (tmp_path / 'final' / 'multiexit.json').write_text('{}')
    RunFolder(trainer, tmp_path, str(tmp_path / 'checkpoint-1.pth.tar'), 2, {})
    assert read_checkpoint(str(tmp_path / 'last.pth.tar'))['epoch'] == 1
    assert len((tmp_path / 'summary.csv').read_text().splitlines()) == 3
    record(trainer, tmp_path)
    # What was calibrated for the weights before is kept beside them.
    assert (tmp_path / 'final.1' / 'multiexit.json').exists() and not (tmp_path / 'final' / 'multiexit.json').exists()


def test_a_run_that_goes_on_in_another_folder_keeps_its_log(trainer, tmp_path):
    first, second = tmp_path / 'a', tmp_path / 'b'
    record(trainer, first)
    checkpoint = find_checkpoint(str(first / 'checkpoint-1.pth.tar'), second)
    RunFolder(trainer, second, checkpoint, 2, {})
    assert [row['epoch'] for row in read_rows(second / 'summary.csv')] == ['0', '1']
    record(trainer, second)
    assert read_rows(second / 'summary.csv') == read_rows(first / 'summary.csv')
    log = read_rows(second / 'final' / 'history.csv')
    assert log == read_rows(first / 'final' / 'history.csv') and [row['epoch'] for row in log] == ['0', '1', '2']


def test_other_settings_are_named_recorded_or_refused(trainer, folder_dataset, tmp_path):
    record(trainer, tmp_path)
    saved = read_checkpoint(str(tmp_path / 'last.pth.tar'))

    def changed(*extra):
        return changed_options(saved, options(folder_dataset, tmp_path, '--world-size', '1', *extra))
    assert changed() == {}
    assert changed('--lr', '0.5', '--epochs', '6', '--threads', '2') == {'lr': 0.03, 'epochs': 3}
    for refused in ('--epochs 2', '--opt sgd', '--weight-decay 0.1', '--validation-images 0',
                    '--model-kwargs base_width=8'):
        with pytest.raises(InputError, match=refused.split()[0]):
            changed(*refused.split())
    args = trainer.args
    RunFolder(trainer, tmp_path, str(tmp_path / 'last.pth.tar'), 3, {'lr': 0.5})
    (step,) = History.read(tmp_path).steps
    assert step.before == {3: {'lr': 0.5}} and step.options['lr'] == args.lr


def test_weights_that_are_not_finite_are_not_exported(trainer, tmp_path):
    record(trainer, tmp_path)
    folder = RunFolder(trainer, tmp_path, str(tmp_path / 'last.pth.tar'), 3, {})
    first = next(trainer.task.get_trainable_module(ema=True).module.parameters())
    for value in (float('nan'), 1e6):  # the latter has no half precision
        first.data.fill_(value)
        with pytest.raises(InputError, match='not finite'):
            folder.export()
    assert load_file(tmp_path / 'final' / 'model.safetensors')


def test_a_full_disk_leaves_the_checkpoint_before(trainer, tmp_path):
    folder = RunFolder(trainer, tmp_path, '', 0, {})
    metrics = dict.fromkeys(trainer.metrics, 50.)
    folder.end_epoch(0, {'loss': 1.}, metrics)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(InputError, match='last.pth.tar. cannot be written .File too large') as raised:
            folder.end_epoch(1, {'loss': 1.}, metrics)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert '\n' not in str(raised.value) and read_checkpoint(str(tmp_path / 'last.pth.tar'))['epoch'] == 0
    assert not list(tmp_path.glob('.*'))


def start(data: Path, output: Path, *extra: str, launch=(sys.executable,)) -> subprocess.Popen:
    """A run in a process group of its own, in the middle of its second epoch."""
    process = subprocess.Popen(
        [*launch, str(PROJECT / 'train_timm.py'),
         *arguments(data, output, '--epochs', '500', '--log-interval', '1', *extra)],
        stderr=subprocess.PIPE, text=True, start_new_session=True)
    for line in process.stderr:
        if 'Train: 1 [   2/' in line:
            return process
    raise AssertionError(line)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_with_one_line(folder_dataset, tmp_path, number):
    process = start(folder_dataset, tmp_path)
    process.send_signal(number)
    lines = [line for line in process.stderr.read().splitlines() if 'Train:' not in line]
    assert process.wait(20) == 128 + number
    assert lines == [f'stopped by {number.name}: the same command with --resume auto resumes after the last checkpoint']
    assert read_checkpoint(str(tmp_path / 'run' / 'last.pth.tar'))['epoch'] == 0


def test_a_signal_waits_for_the_checkpoint(trainer, tmp_path):
    with pytest.raises(KeyboardInterrupt, match=str(int(signal.SIGTERM))), Interruptions() as interruptions:
        with interruptions.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            RunFolder(trainer, tmp_path, '', 0, {}).end_epoch(0, {'loss': 1.}, dict.fromkeys(trainer.metrics, 50.))
        raise AssertionError('not interrupted')
    assert read_checkpoint(str(tmp_path / 'last.pth.tar'))['epoch'] == 0


TORCHRUN = (sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2')


@pytest.mark.slow('20 s of CPU time: two starts of three processes')
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_processes(folder_dataset, tmp_path, number):
    process = start(folder_dataset, tmp_path, launch=TORCHRUN)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    text = process.stderr.read()  # to its end: nothing is left that could write
    process.wait(20)
    assert f'stopped by {number.name}: the same command' in text
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


AGREE = """
import sys, torch
from timm.utils import unwrap_model
from timm_multiexit.training.options import parse_train_args
from timm_multiexit.training.trainer import Trainer
trainer = Trainer(parse_train_args('', sys.argv[1:]))
trainer.distribute()
trainer.train_epoch(0)
task = trainer.task
states = [unwrap_model(task.get_trainable_module(ema=ema)).state_dict() for ema in (False, True)]
accuracies, got = trainer.evaluate(), [None, None]
torch.distributed.all_gather_object(got, states)
if trainer.args.rank == 0:
    for a, b in zip(*got):
        assert a and all(torch.equal(a[k], b[k]) for k in a), [k for k in a if not torch.equal(a[k], b[k])]
    # 41 images, each counted once, by a network that both processes have.
    assert all(abs(value * 41 / 100 - round(value * 41 / 100)) < 1e-3 for value in list(accuracies.values())[:3])
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow('28 s of CPU time: three processes that import torch')
def test_processes_end_an_epoch_with_the_same_networks(folder_dataset, tmp_path):
    script = tmp_path / 'agree.py'
    script.write_text(AGREE)
    done = subprocess.run(
        [*TORCHRUN, str(script),
         *arguments(folder_dataset, tmp_path, '--validation-images', '41', '--model-ema-decay', '0.9')],
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_finished_run_stays_as_it_is(folder_dataset, tmp_path, caplog):
    train(options(folder_dataset, tmp_path, '--epochs', '1'))
    path = tmp_path / 'run'
    (path / 'final' / 'multiexit.json').write_text('{}')
    before = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in path.rglob('*') if p.name != '.lock'}
    train(options(folder_dataset, tmp_path, '--epochs', '1', '--lr', '0.5', '--resume', 'auto'))
    assert 'The run is finished' in caplog.text
    assert before == {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in path.rglob('*') if p.name != '.lock'}
    with pytest.raises(InputError, match='has done 1'):
        train(options(folder_dataset, tmp_path, '--epochs', '0', '--resume', 'auto', '--update-bn',
                      '--initial-checkpoint', str(path / 'final' / 'model.safetensors')))
    train(options(folder_dataset, tmp_path, '--epochs', '2', '--resume', 'auto'))
    assert '--epochs is 2 from epoch 1 on, 1 before' in caplog.text
    recipe = yaml.safe_load((path / 'final' / 'recipe.yaml').read_text())
    (step,) = History.read(path / 'final').steps
    assert recipe['epochs'] == step.options['epochs'] == 2 and step.before == {1: {'epochs': 1}}


def test_a_folder_belongs_to_one_process(tmp_path):
    ready, tell = os.pipe()
    child = os.fork()
    if not child:
        with held(tmp_path):
            os.write(tell, b'held')
            time.sleep(60)
        os._exit(0)
    try:
        os.read(ready, 4)
        with pytest.raises(InputError, match=f'in use by process {child} on '), held(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with held(tmp_path):  # a kill leaves no lock behind
        pass
