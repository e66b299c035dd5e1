"""`timm-multiexit predict` over 20,000 files, some damaged, killed again and again: each image once."""
import random
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import PROJECT
from PIL import Image

from timm_multiexit import EarlyExitRunner, load_exit_config, load_model
from timm_multiexit.data.splits import open_splits
from timm_multiexit.datasets import normalize
from timm_multiexit.inference.export import export_folder
from timm_multiexit.inference.preprocess import Preprocessing

NAME, BUDGET = 'msfuse_cifar.cifar10', '20M'
KILLS, PART_SIZE = 5, 1000
# Ways to damage a PNG file.
DAMAGES = [
    lambda data: b'', lambda data: b'text', lambda data: data[:8], lambda data: data[:40],
    lambda data: data[:len(data) // 2], lambda data: b'\x88' + data[1:],
    lambda data: data[:16] + struct.pack('>II', 10 ** 6, 10 ** 6) + data[24:],  # sides
    lambda data: data[:len(data) // 2] + bytes(200) + data[len(data) // 2 + 200:],
    lambda data: struct.pack('<2sHIHI', b'II', 42, 8, 0, 0),  # a TIFF without a size
    lambda data: b'GIF89a' + data,
]


def start(*args: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, '-c', 'import sys; from timm_multiexit.cli import main; sys.exit(main())', 'predict',
         *map(str, args)], cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def anonymous_megabytes(pid: int) -> float:
    return int(Path(f'/proc/{pid}/status').read_text().split('RssAnon:')[1].split()[0]) / 1024


@pytest.mark.exhaustive('90 s of CPU time: 20,000 images twice, six starts')
def test_kills_among_20_000_files(cifar_root, tmp_path, record_property):
    splits, draw = open_splits('torch/cifar10', cifar_root), random.Random(0)
    pixels = torch.cat([splits.test.pixels, splits.train.pixels[:10_000]])
    damaged = dict(zip(draw.sample(range(20_000), 30), DAMAGES * 3))
    paths = [tmp_path / 'images' / f'{i // 500:02}' / f'{i:05}.png' for i in range(20_000)]
    for i, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[i].permute(1, 2, 0).numpy()).save(path)
        if i in damaged:
            path.write_bytes(damaged[i](path.read_bytes()))
    model, config = load_model(NAME), load_exit_config(NAME)
    export_folder(model, config, tmp_path / 'device')

    output, killed_at = tmp_path / 'out', []
    command = (tmp_path / 'device', tmp_path / 'images', '--output', output, '--average-budget', BUDGET, '--part-size',
               PART_SIZE)
    for part in sorted(draw.sample(range(19), KILLS)):
        with start(*command) as process:
            while not (output / f'part-{part:05}.parquet').exists():
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.01)
            time.sleep(draw.uniform(0., 1.))
            process.kill()
        killed_at.append(len(list(output.glob('part-*'))))
    assert max(killed_at) < 20  # or nothing was tried
    memory, last = [], killed_at[-1]
    with start(*command) as process:
        while process.poll() is None:
            if (parts := len(list(output.glob('part-*')))) > last:
                memory, last = [*memory, anonymous_megabytes(process.pid)], parts
            time.sleep(0.05)
        assert process.returncode == 0, process.stderr.read()
        assert '20,000 images in 20 parts, 30 of them with an error' in process.stdout.read()

    rows = pa.concat_tables([pq.read_table(path) for path in sorted(output.glob('part-*'))]).to_pydict()
    assert rows['path'] == [str(path) for path in paths]
    assert [i for i, error in enumerate(rows['error']) if error] == sorted(damaged)
    whole = np.array([i for i in range(20_000) if i not in damaged])
    preprocessing = Preprocessing.of(model)
    run = EarlyExitRunner(model, config.policy_for(BUDGET), engine='onnx').run(
        normalize(pixels[whole], preprocessing.mean, preprocessing.std))
    found = {name: np.array(rows[name], dtype=float)[whole] for name in ('exit', 'label', 'confidence', 'macs')}
    same = (found['exit'] == run.exit_index.numpy() + 1) & (found['label'] == run.prediction.numpy())
    apart = abs(found['confidence'] - run.confidence.numpy())[same].max()
    record_property('measured', f'20,000 images, 30 damaged, kills after {killed_at} of 20 parts: each image once, '
                    f'{(~same).sum()} answers differ, confidences by up to {apart:.1e}; '
                    f'{memory[0]:.0f} to {memory[-1]:.0f} MB')
    assert (~same).sum() <= 2 and apart <= 1e-4
    np.testing.assert_array_equal(found['macs'], np.array(config.exit_macs)[found['exit'].astype(int) - 1])
    for name in ('label', 'class_name', 'confidence', 'exit', 'macs'):
        assert [i for i, value in enumerate(rows[name]) if value is None] == sorted(damaged)
