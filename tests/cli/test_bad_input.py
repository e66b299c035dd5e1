"""Bad input to every command: one line on standard error, no traceback, nothing answered. One table, a line each."""
import json
import shutil
import signal

import pytest
import torch
from conftest import SAMPLES
from safetensors.torch import load_file, save_file

from timm_multiexit.cli import main
from timm_multiexit.commands import Interruptions
from timm_multiexit.errors import first_line, run_command
from timm_multiexit.models._pretrained import WEIGHTS_DIR

pytestmark = pytest.mark.usefixtures('one_thread')
NET = 'msfuse_cifar_budgeted.cifar10'
IMAGE = str(SAMPLES / 'cifar10_test_0001_ship.png')
STATE = load_file(WEIGHTS_DIR / NET / 'model.safetensors')


def altered(path, change):
    state = {k: v.clone() for k, v in STATE.items()}
    change(state)
    save_file(state, path)


def scaled(dtype):
    return lambda state: state.update({k: v.to(dtype) for k, v in state.items()})


def set_to(value):
    return lambda state: state['exits.0.fc.weight'].fill_(value)


WEIGHTS = {
    'nan': set_to(float('nan')), 'inf': set_to(float('inf')), 'int8': scaled(torch.int8),
    'missing': lambda state: state.pop('exits.0.fc.weight'), 'more': lambda state: state.update(x=torch.zeros(1)),
    'shape': lambda state: state.update({'exits.0.fc.weight': torch.zeros(3, 3)}), 'empty': dict.clear}
PICKLES = {
    'list': [], 'tensor': torch.zeros(2), 'none': {'state_dict': None}, 'keys': {1: torch.zeros(1)},
    'values': {'exits.0.fc.weight': 'x'}}


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """A folder of damaged files."""
    root = tmp_path_factory.mktemp('files')
    for name, change in WEIGHTS.items():
        altered(root / f'{name}.safetensors', change)
    for name, content in PICKLES.items():
        torch.save(content, root / f'{name}.pth')
    (root / 'text.png').write_text('text')
    (root / 'nothing.png').write_bytes(b'')
    (root / 'cut.png').write_bytes((SAMPLES / 'cifar10_test_0001_ship.png').read_bytes()[:200])
    (root / 'cut.safetensors').write_bytes((WEIGHTS_DIR / NET / 'model.safetensors').read_bytes()[:5000])
    (root / 'folder').mkdir()
    for name, text in (('brace', '{'), ('list', '[]'), ('null', 'null'), ('deep', '[' * 100_000), ('number', '1e999')):
        (root / f'{name}.json').write_text(text)
    shutil.copytree(WEIGHTS_DIR / NET, root / 'own')
    return root


TABLE = """
classify
classify IMAGE --budget 0 | classify IMAGE --budget -1 | classify IMAGE --budget nan | classify IMAGE --budget 1e999
classify IMAGE --budget 30X | classify IMAGE --budget 1M | classify IMAGE --average-budget 1 | classify IMAGE --fast
classify IMAGE --confidence 0 | classify IMAGE --confidence 2 | classify IMAGE --confidence nan
classify IMAGE --confidence x | classify IMAGE --deadline 0 | classify IMAGE --deadline -3ms
classify IMAGE --deadline x | classify IMAGE --budget 30M --confidence 0.9 | classify IMAGE --max-loss x
classify IMAGE --model nope | classify IMAGE --model resnet18 | classify IMAGE --model msfuse_cifar.nope
classify IMAGE --model ftp:x | classify IMAGE --model local-dir:/nope | classify IMAGE --model local-dir:FILES
classify IMAGE --model vgg8_mc_cifar | classify IMAGE --device foo | classify IMAGE --device cuda:99
classify IMAGE --device mps | classify IMAGE --device meta: | classify IMAGE --num-classes 5
classify IMAGE --num-classes 0 | classify IMAGE --num-classes -1 | classify IMAGE --num-classes x
classify /nope.png | classify FILES/folder | classify FILES/text.png | classify FILES/nothing.png
classify FILES/cut.png
classify LONG | classify IMAGE --nope
classify IMAGE --model NET --checkpoint /nope | classify IMAGE --model NET --checkpoint FILES/folder
classify IMAGE --model NET --checkpoint FILES/nan.safetensors
classify IMAGE --model NET --checkpoint FILES/inf.safetensors
classify IMAGE --model NET --checkpoint FILES/int8.safetensors
classify IMAGE --model NET --checkpoint FILES/missing.safetensors
classify IMAGE --model NET --checkpoint FILES/more.safetensors
classify IMAGE --model NET --checkpoint FILES/shape.safetensors
classify IMAGE --model NET --checkpoint FILES/empty.safetensors
classify IMAGE --model NET --checkpoint FILES/cut.safetensors
classify IMAGE --model NET --checkpoint FILES/list.pth | classify IMAGE --model NET --checkpoint FILES/tensor.pth
classify IMAGE --model NET --checkpoint FILES/none.pth | classify IMAGE --model NET --checkpoint FILES/keys.pth
classify IMAGE --model NET --checkpoint FILES/values.pth | classify IMAGE --model NET --checkpoint FILES/text.png
classify IMAGE --model NET --average-budget 20M --exit-config /nope
classify IMAGE --model NET --average-budget 20M --exit-config FILES/brace.json
classify IMAGE --model NET --average-budget 20M --exit-config FILES/list.json
classify IMAGE --model NET --average-budget 20M --exit-config FILES/null.json
classify IMAGE --model NET --average-budget 20M --exit-config FILES/deep.json
classify IMAGE --model NET --average-budget 20M --exit-config FILES/number.json
costs | costs nope | costs resnet18 | costs NET --input-size 1000000 32 32 | costs NET --input-size 3 0 32
costs NET --input-size 3 -1 32 | costs NET --input-size 3 32 | costs NET --num-classes 0 | costs NET --num-classes -1
evaluate NET | evaluate NET --data-dir /nope | evaluate NET --data-dir /tmp --dataset nope
evaluate NET --data-dir DATA --validation-images 0 | evaluate NET --data-dir DATA --batch-size 0
evaluate NET --data-dir DATA --dataset torch/nope | evaluate NET --data-dir DATA --measure x
calibrate NET --data-dir DATA
calibrate NET --data-dir DATA --output FILES/text.png/x.json --checkpoint FILES/nan.safetensors
benchmark NET --rounds 0 | benchmark NET --images 0 --data-dir DATA | benchmark NET --threads 0
benchmark NET --threads 100000 | benchmark NET --engine x | benchmark NET --average-budget 20M
profile nope | profile NET --batch-size 0 | nope
"""


@pytest.mark.parametrize('line', [part.strip() for row in TABLE.strip().splitlines() for part in row.split(' | ')])
def test_bad_input_ends_in_one_line(line, files, cifar_root, capsys):
    words = dict(IMAGE=IMAGE, NET=NET, DATA=cifar_root, LONG='x' * 300)
    argv = [words.get(word, word.replace('FILES', str(files))) for word in line.split()]
    try:
        status = main(argv)
    except SystemExit as stopped:
        status = stopped.code
    out, err = capsys.readouterr()
    assert status in (1, 2), out
    assert 'error: ' in err.splitlines()[-1] and 'Traceback' not in err
    assert len(err.strip().splitlines()) == 1, err
    assert '->' not in out


def test_traceback_shows_the_rest(monkeypatch):
    def broken(args):
        raise ZeroDivisionError('one\ntwo')
    monkeypatch.setattr('timm_multiexit.cli.costs.run', broken)
    assert main(['costs', NET]) == 1
    with pytest.raises(ZeroDivisionError):
        main(['costs', NET, '--traceback'])


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_command_in_one_line(number, capsys):
    def run(argv):
        with Interruptions():
            signal.raise_signal(number)
    assert run_command('test', run, []) == 128 + number
    assert capsys.readouterr().err == 'interrupted\n'


@pytest.mark.parametrize('error, line', [
    (OSError(), 'OSError'), (ValueError(' \n'), 'ValueError'), (KeyboardInterrupt(), 'KeyboardInterrupt'),
    (RuntimeError('\none\ntwo'), 'one')])
def test_an_error_without_a_message_is_told_by_its_type(error, line):
    assert first_line(error) == line


@pytest.mark.parametrize('value', [None, [], {}, 'x', -1, 1e400, [None], [[1]], ['a'] * 5, [0] * 5, [-1] * 5, True])
def test_malformed_exit_configs_are_refused(value, files, tmp_path, capsys):
    """Each field of the stored config in turn."""
    stored = json.loads((WEIGHTS_DIR / NET / 'multiexit.json').read_text())
    failures = []
    for name in stored:
        if stored[name] == value or (name == 'class_names' and value in (None, [])):
            continue
        (tmp_path / 'multiexit.json').write_text(json.dumps({**stored, name: value}))
        status = main(['classify', IMAGE, '--model', NET, '--average-budget', '20M', '--exit-config',
                       str(tmp_path / 'multiexit.json')])
        err = capsys.readouterr().err.strip()
        if status != 2 or len(err.splitlines()) != 1:
            failures.append(f'{name} = {value!r}: status {status}, {err}')
    assert not failures, '\n'.join(failures)
