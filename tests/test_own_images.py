"""The README's commands for one's own images; all ways to classify agree to the image."""
import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import push
import pytest
from conftest import PROJECT
from model_repo import read_network
from photos import TWELVE, make_photos, save_12_bits
from publication import build_folder

import train_timm
from timm_multiexit import EarlyExitRunner, ExitPolicy, load_model
from timm_multiexit.cli import main
from timm_multiexit.data.images import Images
from timm_multiexit.data.splits import open_splits
from timm_multiexit.evaluation.evaluate import exit_logits
from timm_multiexit.evaluation.results import Results
from timm_multiexit.inference.preprocess import Preprocessing

pytestmark = pytest.mark.usefixtures('one_thread')
SECTION = re.compile(r'^## Your own images\n.*?```bash\n(.*?)```', re.MULTILINE | re.DOTALL)
PROGRAMS = {'train_timm.py': train_timm.main, 'hub/push.py': push.main, 'timm-multiexit': main}


def commands(photos: Path, work: Path, suffix: str, *options: str):
    """(program, arguments) of each of the README's, for a small network and few epochs."""
    text = (PROJECT / 'README.md').read_text(encoding='utf-8')
    lines = SECTION.search(text)[1].strip().splitlines()
    assert len(lines) == 6
    more = {
        'train_timm.py': ['--model-kwargs', 'steps=(1,1,1)', 'base_width=8', 'growth=4', 'head_width=16', '--output',
                          str(work / 'output'), '--threads', '1', '--device', 'cpu', *options],
        'benchmark': ['--rounds', '1', '--images', '20'], 'classify': ['--json']}
    for line in lines:
        line = line.replace('PHOTOS', str(photos)).replace('output/mine', str(work / 'output' / 'mine'))
        program, *words = [word.strip("'") for word in re.findall(r"'[^']*'|\S+", line.removeprefix('python '))]
        words = [word.replace('.jpg', suffix) for word in words]
        yield program, [*words, *more.get(program, []), *more.get(words[0], [])]


def typed(program: str, words) -> str:
    """What a command prints that is run as a user runs it."""
    start = ['-c', 'import sys; from timm_multiexit.cli import main; sys.exit(main())'] if program == 'timm-multiexit' \
        else [program]
    done = subprocess.run([sys.executable, *start, *words], capture_output=True, text=True, cwd=PROJECT,
                          encoding='utf-8')
    assert done.returncode == 0, f'{program} {words}: {done.stderr}'
    return done.stdout


def called(program: str, words) -> str:
    """The same in this process, which takes a third of the time."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert not PROGRAMS[program](words), f'{program} {words}'
    return out.getvalue()


@pytest.mark.slow('100 s of CPU time: three trainings and 21 commands')
@pytest.mark.parametrize('make, suffix, options, run', [
    (lambda root: make_photos(root, TWELVE, {'train': 30, 'test': 6}, suffix='.jpg'), '.jpg', ['--epochs', '6'], typed),
    (lambda root: make_photos(root, TWELVE[:5], {'train': 20, 'test': 6}, (190, 260), suffix='.jpg'), '.jpg',
     ['--epochs', '4', '--input-size', '96'], called),
    (lambda root: make_photos(root, TWELVE[:3], {'train': 40, 'test': 8}, (48, 48), save_12_bits), '.png',
     ['--epochs', '6', '--in-chans', '1'], called),
], ids=['twelve classes', 'different sizes', 'grey 12-bit scans'])
def test_six_commands(tmp_path, make, suffix, options, run):
    photos = make(tmp_path / 'photos')
    outputs = [run(*command) for command in commands(photos, tmp_path, suffix, *options)]
    final = tmp_path / 'output' / 'mine' / 'final'
    assert 'balanced accuracy' in outputs[1] and 'model.safetensors' in outputs[5]
    files = sorted((photos / 'test').glob('*/*'))
    assert sorted(Path(answer['image']) for answer in json.loads(outputs[3])) == files

    model = load_model(checkpoint=final)
    names = model.pretrained_cfg['label_names']
    splits = open_splits('folder', photos, names)
    evaluated = exit_logits(model, Images(splits.test, Preprocessing.of(model))).logits[-1]
    answers = {path: names[i] for path, i in zip(splits.test.sources, evaluated.argmax(1))}
    assert sorted(answers) == files
    accuracy = 100 * sum(name == path.parent.name for path, name in answers.items()) / len(files)
    assert Results.load(final / 'results.json').exits[-1].accuracy == pytest.approx(accuracy, abs=1e-3)
    assert accuracy > 150 / len(names)  # it learned

    words = ['classify', str(photos / 'test'), '--checkpoint', str(final), '--json']
    classified = json.loads(run('timm-multiexit', words))
    assert {Path(answer['image']): answer['label'] for answer in classified} == answers
    published = build_folder(read_network(str(final), 'msfuse_cifar_budgeted.mine'), tmp_path / 'published', 'me')
    for network in (model, load_model(f'local-dir:{published}')):
        paths, batch = EarlyExitRunner(network, ExitPolicy.at_exit(2, 3)).run_folder(photos / 'test')
        assert {path: network.pretrained_cfg['label_names'][i] for path, i in zip(paths, batch.prediction)} == answers
