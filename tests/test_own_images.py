"""The README's commands for one's own images, as a user would type them; all ways to classify agree to the image."""
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PROJECT
from model_repo import read_network
from photos import TWELVE, make_photos, save_12_bits
from publication import build_folder

from timm_multiexit import EarlyExitRunner, ExitPolicy, load_model
from timm_multiexit.evaluation.results import Results

CLI = [sys.executable, '-c', 'import sys; from timm_multiexit.cli import main; sys.exit(main())']
SECTION = re.compile(r'^## Your own images\n.*?```bash\n(.*?)```', re.MULTILINE | re.DOTALL)


def commands(photos: Path, work: Path, *options: str):
    """The README's, for a small network and few epochs."""
    text = (PROJECT / 'README.md').read_text(encoding='utf-8')
    lines = SECTION.search(text)[1].strip().splitlines()
    assert len(lines) == 6
    for line in lines:
        line = line.replace('PHOTOS', str(photos)).replace('output/mine', str(work / 'output' / 'mine'))
        words = [word.strip("'") for word in re.findall(r"'[^']*'|\S+", line)]
        if words[1] == 'train_timm.py':
            words += ['--model-kwargs', 'steps=(1,1,1)', 'base_width=8', 'growth=4', 'head_width=16', '--output',
                      str(work / 'output'), '--threads', '1', '--device', 'cpu', *options]
        if words[0] == 'timm-multiexit':
            words = [*CLI, *words[1:]]
            words += ['--rounds', '1', '--images', '20'] if 'benchmark' in words else []
            words += ['--json'] if 'classify' in words else []
        else:
            words[0] = sys.executable
        yield words


@pytest.mark.exhaustive('100 s of CPU time each: three trainings and 18 commands')
@pytest.mark.parametrize('make, options', [
    (lambda root: make_photos(root, TWELVE, {'train': 30, 'test': 6}, suffix='.jpg'), ['--epochs', '6']),
    (lambda root: make_photos(root, TWELVE[:5], {'train': 20, 'test': 6}, (190, 260), suffix='.jpg'),
     ['--epochs', '4', '--input-size', '96']),
    (lambda root: make_photos(root, TWELVE[:3], {'train': 40, 'test': 8}, (48, 48), save_12_bits),
     ['--epochs', '6', '--in-chans', '1']),
], ids=['twelve classes', 'different sizes', 'grey 12-bit scans'])
def test_six_commands(tmp_path, make, options):
    photos, outputs = make(tmp_path / 'photos'), []
    pattern = str(photos / 'test' / '*' / '*')
    for words in commands(photos, tmp_path, *options):
        words = [pattern if word.startswith(f'{photos}/test/') else word for word in words]
        done = subprocess.run(words, capture_output=True, text=True, cwd=PROJECT, encoding='utf-8')
        assert done.returncode == 0, f'{words}: {done.stderr}'
        outputs.append(done.stdout)
    final = tmp_path / 'output' / 'mine' / 'final'
    assert 'balanced accuracy' in outputs[1] and 'model.safetensors' in outputs[5]

    def correct(names, paths):
        return sum(name == path.parent.name for name, path in zip(names, paths))

    evaluated = Results.load(final / 'results.json')
    expected = round(evaluated.exits[-1].accuracy * evaluated.test_images / 100)
    answers = json.loads(subprocess.run(
        [*CLI, 'classify', str(photos / 'test'), '--checkpoint', str(final), '--json'],
        capture_output=True, text=True, cwd=PROJECT, encoding='utf-8').stdout)
    assert correct([a['label'] for a in answers], [Path(a['image']) for a in answers]) == expected
    published = build_folder(read_network(str(final), 'msfuse_cifar_budgeted.mine'), tmp_path / 'published', 'me')
    for model in (load_model(checkpoint=final), load_model(f'local-dir:{published}')):
        paths, run = EarlyExitRunner(model, ExitPolicy.at_exit(2, 3)).run_folder(photos / 'test')
        names = [model.pretrained_cfg['label_names'][i] for i in run.prediction]
        assert len(paths) == evaluated.test_images and correct(names, paths) == expected
        assert torch.isfinite(run.logits).all()
    assert expected / evaluated.test_images > 1.5 / len(model.pretrained_cfg['label_names'])  # it learned
