"""`timm-multiexit predict`: the answers of classify from every kind of source, each once, whatever ends a run."""
import json
import os
import shutil
import signal
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PROCESSES
from image_sources import DAMAGED
from killer import Killer

pytest.importorskip('onnxruntime')

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

from timm_multiexit.cli import main  # noqa: E402
from timm_multiexit.errors import InputError, UnreachableError  # noqa: E402
from timm_multiexit.files import held  # noqa: E402
from timm_multiexit.inference import device  # noqa: E402
from timm_multiexit.inference.device import FolderEngine, classify  # noqa: E402
from timm_multiexit.inference.predict import SCHEMA, policy_on_record, write_parts  # noqa: E402
from timm_multiexit.inference.sources import open_sources, read_images  # noqa: E402
from timm_multiexit.stopping.config import ExitConfig  # noqa: E402
from timm_multiexit.stopping.policy import ExitPolicy  # noqa: E402

STOP = ('--confidence', '0.3')
pytest_plugins = ['image_sources']  # its fixtures


@pytest.fixture(scope='module', autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='module')
def folder(exported):
    return exported


@pytest.fixture(scope='module')
def expected(folder, photos):
    """What classify answers, one by one."""
    config, paths = ExitConfig.load(folder / 'multiexit.json'), sorted(photos.rglob('[0-9]*.png'))
    answers = list(classify(
        FolderEngine(folder), config, ExitPolicy.at_confidence(0.3, config.temperatures), paths, 1))
    assert [i for i, answer in enumerate(answers) if 'error' in answer] == list(DAMAGED)
    assert len({answer['exit'] for answer in answers if 'exit' in answer}) > 1
    return answers


def predict(*args):
    return main(['predict', *map(str, args)])


def rows_of(output):
    parts = sorted(output.glob('part-*.parquet'))
    assert [path.name for path in parts] == [f'part-{k:05}.parquet' for k in range(len(parts))]
    tables = [pq.read_table(path) for path in parts]
    assert all(table.schema.equals(SCHEMA) for table in tables)
    return pa.concat_tables(tables).to_pylist()


def check(rows, paths, expected):
    assert [row['path'] for row in rows] == paths
    for row, answer in zip(rows, expected):
        if 'error' in answer:
            assert {k for k, v in row.items() if v is not None} == {'path', 'error'}
            assert row['error'] in (answer['error'], answer['error'].replace(f"'{answer['image']}'", 'the image'))
            continue
        assert row['error'] is None and row['label'] == int(row['class_name'][1:])
        assert (row['class_name'], row['exit'], row['macs']) == (answer['label'], answer['exit'], answer['macs'])
        assert row['confidence'] == pytest.approx(answer['probability'], abs=1e-6)


@pytest.mark.parametrize('kind', ['folder', 'list', 'shards', 'parquet', 'hf'])
def test_every_source_has_the_answers_of_classify(kind, sources, folder, expected, tmp_path, capsys):
    given, paths = sources[kind]
    assert predict(folder, *given, '--output', tmp_path / 'out', *STOP, '--part-size', 16, '--batch-size', 7) == 0
    rows = rows_of(tmp_path / 'out')
    check(rows, paths, expected)
    assert len(pq.read_table(tmp_path / 'out')) == 40  # the record beside the parts does not disturb readers
    macs = np.mean([row['macs'] for row in rows if row['macs']]) / 1e6
    assert f'40 images in 3 parts, 3 of them with an error, {macs:.2f} M MACs' in capsys.readouterr().out


def test_killed_before_any_change_of_a_file_it_goes_on(folder, photos, expected, tmp_path, capsys):
    command = (folder, photos, '--output', tmp_path / 'out', *STOP, '--part-size', 12)
    with Killer(tmp_path) as operations:
        predict(*command)
    assert len([done for done in operations.done if done[0] == 'os.rename']) == 5
    for k in range(len(operations.done)):
        for path in (tmp_path / 'out').iterdir():
            path.unlink()
        (tmp_path / 'out').rmdir()
        with Killer(tmp_path, k):
            predict(*command)
        assert predict(*command) == 0, capsys.readouterr().err
        check(rows_of(tmp_path / 'out'), [answer['image'] for answer in expected], expected)
        assert {path.name for path in (tmp_path / 'out').iterdir() if path.suffix != '.parquet'} <= {
            '.lock', '_predict.json'}, operations.done[k]


def start(log, *args):
    """The command in a process of its own, where torch is loaded already; what it prints goes to a file."""
    process = PROCESSES.Process(target=_predict, args=(log, args))
    process.start()
    return process


def _predict(log, args):
    with log.open('w') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(predict(*args))


def wait_for(process, path, log):
    while not path.exists():
        assert process.is_alive(), log.read_text()
        time.sleep(0.002)


def test_parts_are_written_alone(folder, photos, expected, tmp_path):
    engine, config = FolderEngine(folder), ExitConfig.load(folder / 'multiexit.json')
    sources = open_sources([str(photos)])
    policy = ExitPolicy.at_confidence(0.3, config.temperatures)
    for first, count in ((3, 2), (0, 1), (1, 2), (4, 3)):
        write_parts(engine, config, policy, sources, tmp_path, 9, 4, 1, first, count)
        assert len(list(tmp_path.iterdir())) == {3: 2, 0: 3, 1: 5, 4: 5}[first]
    check(rows_of(tmp_path), [answer['image'] for answer in expected], expected)


def test_stopped_and_killed_it_goes_on(folder, photos, expected, tmp_path):
    answers = [answer for answer in expected if 'error' not in answer] * 60
    (tmp_path / 'list.txt').write_text('\n'.join(answer['image'] for answer in answers), encoding='utf-8')
    output = tmp_path / 'out'
    command = (folder, tmp_path / 'list.txt', '--output', output, *STOP, '--part-size', 100)
    for number, part in ((signal.SIGTERM, 2), (signal.SIGKILL, 7), (signal.SIGKILL, 13)):
        process = start(tmp_path / 'log', *command)
        wait_for(process, output / f'part-{part:05}.parquet', tmp_path / 'log')
        os.kill(process.pid, number)
        process.join()
        if number == signal.SIGTERM:
            assert process.exitcode == 143
            assert (tmp_path / 'log').read_text() == 'stopped by SIGTERM: run the same command to resume\n'
        else:
            assert 'resumes in' in (tmp_path / 'log').read_text()
        assert len(rows_of(output)) < len(answers)  # or nothing was tried
    assert predict(*command) == 0
    check(rows_of(output), [answer['image'] for answer in answers], answers)
    times = {path: path.stat().st_mtime_ns for path in output.glob('part-*')}
    assert predict(*command) == 0
    assert times == {path: path.stat().st_mtime_ns for path in output.glob('part-*')}  # finished: nothing is written


def test_another_command_into_the_same_folder_is_refused(folder, photos, tmp_path, capsys):
    place, output = tmp_path / 'images', tmp_path / 'out'
    place.mkdir()
    for i in range(3):
        os.link(photos / 'a' / '00.png', place / f'{i}.png')
    command = (folder, place, '--output', output)
    assert predict(*command, *STOP) == 0
    assert predict(*command, *STOP, '--batch-size', 2) == 0  # answers do not depend on it
    before = rows_of(output)
    capsys.readouterr()
    (tmp_path / 'other').symlink_to(place)

    def refused(words, *args):
        assert predict(*args) == 2
        err = capsys.readouterr().err
        assert err.count('\n') == 1 and words in err, err
        assert rows_of(output) == before

    refused('"confidence": 0.3}, now {"confidence": 0.4}', *command, '--confidence', '0.4')
    refused('now {})', *command)
    refused('(part_size 10000, now 5)', *command, *STOP, '--part-size', 5)
    refused(f'now {{"source": "{tmp_path}/other"', folder, tmp_path / 'other', '--output', output, *STOP)
    os.link(photos / 'a' / '03.png', place / '7.png')
    refused('"images": 3', *command, *STOP)
    (place / '7.png').unlink()
    shutil.copytree(folder, tmp_path / 'device')
    config = json.loads((folder / 'multiexit.json').read_text())
    (tmp_path / 'device' / 'multiexit.json').write_text(json.dumps({**config, 'class_names': list('abcdefghij')}))
    refused('(network "', tmp_path / 'device', place, '--output', output, *STOP)
    with held(output):
        process = start(tmp_path / 'log', folder, place, '--output', output, *STOP)
        process.join()
    assert process.exitcode == 2 and f'is in use by process {os.getpid()} on' in (tmp_path / 'log').read_text()
    for text in ('[]', '{}', '{'):
        (output / '_predict.json').write_text(text)
        refused('record', *command, *STOP)
    refused('holds something other than predictions', folder, place, '--output', place, *STOP)


def test_a_rerun_keeps_the_policy_that_was_solved(folder, photos, tmp_path):
    """Solved for milliseconds, the thresholds would be others each time."""
    policy = ExitPolicy((0.123, 2.5, -9.), (1.5,) * 3)
    arguments = (
        tmp_path, FolderEngine(folder), open_sources([str(photos)]), {'average_latency': '2ms'}, 100)
    assert policy_on_record(*arguments, lambda: policy) == policy
    assert policy_on_record(*arguments, lambda: ExitPolicy.at_exit(1, 3)) == policy


def test_a_source_that_changes_meanwhile_is_noticed(photos, tmp_path):
    os.link(photos / 'a' / '00.png', tmp_path / '0.png')
    sources = open_sources([str(tmp_path)])
    os.link(photos / 'a' / '03.png', tmp_path / '1.png')
    with pytest.raises(InputError, match='names other images than at the start'):
        list(read_images(sources, 0))


def test_an_unreachable_image_ends_the_run_without_its_part(folder, photos, tmp_path, monkeypatch, capsys):
    read = device.preprocess

    def unplugged(source, how):
        if str(source).endswith('03.png'):
            raise UnreachableError('the disk is gone')
        return read(source, how)
    monkeypatch.setattr(device, 'preprocess', unplugged)
    assert predict(folder, photos, '--output', tmp_path / 'out', *STOP) == 2
    assert 'the disk is gone, and run the same command again' in capsys.readouterr().err
    assert not list((tmp_path / 'out').glob('part-*'))


TABLE = """
DEVICE /nope | DEVICE FILES/empty | DEVICE FILES/empty.txt | DEVICE FILES/nope.tar | DEVICE FILES/text.tar
DEVICE FILES/empty.tar | DEVICE FILES/none.tar | DEVICE FILES/text.parquet | DEVICE FILES/other.parquet
DEVICE FILES/path.parquet
DEVICE FILES/image.png | DEVICE PHOTOS /nope | PHOTOS PHOTOS | /nope PHOTOS | DEVICE PHOTOS --batch-size 0
DEVICE PHOTOS --part-size 0 | DEVICE PHOTOS --budget 1 | DEVICE PHOTOS --average-budget x
DEVICE PHOTOS --average-latency 2ms | DEVICE PHOTOS --max-loss 1 | DEVICE PHOTOS --confidence 2
DEVICE PHOTOS --output FILES/image.png | DEVICE PHOTOS --output FILES/image.png/x | DEVICE PHOTOS --output FILES
DEVICE PHOTOS --output /proc/nope | DEVICE
"""


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    place = tmp_path_factory.mktemp('files')
    (place / 'empty').mkdir()
    for name in ('empty.txt', 'empty.tar'):
        (place / name).touch()
    for name in ('text.tar', 'text.parquet', 'image.png'):
        (place / name).write_text('text')
    tarfile.open(place / 'none.tar', 'w').close()
    pq.write_table(pa.table(dict(pixels=[b''], name=['x'])), place / 'other.parquet')
    pq.write_table(pa.table(dict(image=[dict(path='x')])), place / 'path.parquet')
    return place


@pytest.mark.parametrize('line', [part.strip() for row in TABLE.strip().splitlines() for part in row.split(' | ')])
def test_bad_input_ends_in_one_line(line, files, folder, photos, tmp_path, capsys):
    words = dict(DEVICE=str(folder), PHOTOS=str(photos))
    argv = [words.get(word, word.replace('FILES', str(files))) for word in line.split()]
    if '--output' not in argv:
        argv += ['--output', str(tmp_path / 'out')]
    try:
        status = predict(*argv)
    except SystemExit as stopped:
        status = stopped.code
    err = capsys.readouterr().err
    assert status == 2 and err.count('\n') == 1 and 'error: ' in err and 'Traceback' not in err, err
    assert not list(tmp_path.glob('out/part-*'))


def anonymous_megabytes(pid):
    return int(Path(f'/proc/{pid}/status').read_text().split('RssAnon:')[1].split()[0]) / 1024


@pytest.mark.slow('5 s of CPU time: 8,500 images in a process of its own')
def test_memory_stays_flat(folder, expected, tmp_path):
    """From 2,000 to 8,000 images."""
    paths = [answer['image'] for answer in expected if 'error' not in answer] * 230
    (tmp_path / 'list.txt').write_text('\n'.join(paths[:8500]), encoding='utf-8')
    command = (folder, tmp_path / 'list.txt', '--output', tmp_path / 'out', '--part-size', 500, '--budget', '1M')
    process, memory = start(tmp_path / 'log', *command), []
    for part in (3, 15):
        wait_for(process, tmp_path / 'out' / f'part-{part:05}.parquet', tmp_path / 'log')
        memory.append(anonymous_megabytes(process.pid))
    process.join()
    assert process.exitcode == 0
    assert memory[1] < memory[0] + 20
