"""A run that is killed at a random moment and gone on with gives the weights of one that was not, to the bit."""
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import PROJECT

pytest_plugins = ['training_support']  # folder_dataset
KILLS = 20


def command(data: Path, output: Path, *extra: str):
    return [
        sys.executable, str(PROJECT / 'train_timm.py'), '--data-dir', str(data), '--dataset', 'folder',
        '--output', str(output), '--experiment', 'run', '--model-kwargs', 'steps=(1,1,1)', 'base_width=8', 'growth=4',
        'head_width=16', '--batch-size', '40', '--validation-images', '40', '--epochs', '6', '--model-ema', '--mixup',
        '0.2', '--cutmix', '0.5', '--reprob', '0.25', '--aa', 'rand-m5-n1', '--drop', '0.1', '--threads', '1',
        '--log-interval', '1', '--device', 'cpu', '--resume', 'auto', *extra]


def train(*args: object) -> None:
    done = subprocess.run(command(*args), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def weights(output: Path):
    checkpoint = torch.load(output / 'run' / 'last.pth.tar', map_location='cpu', weights_only=False)
    return {f'{part}.{name}': value for part in ('state_dict', 'state_dict_ema')
            for name, value in checkpoint[part].items()}


def train_and_kill(moment: float, *args: object) -> bool:
    """Kills a run so many seconds after its first step; says whether it was still going on."""
    with subprocess.Popen(command(*args), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            if 'Train: ' in line:
                break
        time.sleep(moment)
        alive = process.poll() is None
        process.kill()
    return alive


@pytest.mark.exhaustive('10 minutes of CPU time each: 41 starts of train_timm.py')
@pytest.mark.parametrize('loader', [['memory'], ['timm', '--workers', '2']], ids=['memory', 'timm'])
def test_random_kills(loader, folder_dataset, tmp_path, record_property):
    extra = ['--loader', *loader]
    start = time.monotonic()
    train(folder_dataset, tmp_path / 'whole', *extra)
    lasts = time.monotonic() - start
    expected, draw, early = weights(tmp_path / 'whole'), random.Random(0), 0
    for number in range(KILLS):
        output = tmp_path / str(number)
        early += train_and_kill(draw.uniform(0., 0.7 * lasts), folder_dataset, output, *extra)
        train(folder_dataset, output, *extra)
        resumed = weights(output)
        assert expected.keys() == resumed.keys()
        assert [name for name in expected if not torch.equal(expected[name], resumed[name])] == [], number
    assert early > KILLS / 2  # or nothing was tried
    record_property('measured', f'{KILLS} kills, {early} of them before the end: all weights identical to the bit')
