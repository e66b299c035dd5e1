"""An exported folder in an environment that holds NumPy, Pillow and onnxruntime alone gives the package's answers."""
import subprocess
import sys
import venv
from functools import partial
from importlib.metadata import version

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from timm_multiexit import EarlyExitRunner, exit_costs, list_networks, load_exit_config, load_model
from timm_multiexit.data.splits import open_splits
from timm_multiexit.inference.batch_loop import run_one, segments_of
from timm_multiexit.inference.device import FolderEngine
from timm_multiexit.inference.export import export_folder, write_graphs
from timm_multiexit.inference.onnx_engine import OnnxEngine
from timm_multiexit.inference.preprocess import Preprocessing
from timm_multiexit.inference.profile import take_turns
from timm_multiexit.stopping.config import ExitConfig
from timm_multiexit.stopping.policy import ExitPolicy

BATCH_SIZES = (1, 7, 256)
BACKBONE = 'mobilenetv3_small_050'
MERGED = ('msfuse_cifar_budgeted.cifar10',)  # with merged graphs
# Answers of the folder argv[1] to the images of argv[2] under a budget of argv[3] MACs, one file for each batch size.
DEVICE = f'''
import sys
from pathlib import Path
folder, images, budget = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
sys.path.insert(0, str(folder))
import numpy as np
from timm_multiexit.inference import device
engine = device.FolderEngine(folder)
policy = device.ExitConfig.load(folder / 'multiexit.json').policy_for(budget)
segments = device.segments_of(policy)
how = engine.graphs['preprocessing']
paths = device.image_paths(images)
for size in {BATCH_SIZES}:
    answers = []
    for i in range(0, len(paths), size):
        batch = np.stack([device.preprocess(path, how)[0] for path in paths[i:i + size]])
        answers.append(device.run_batch(engine, policy, segments, batch, size))
    np.savez(folder / f'answers_{{size}}.npz', exits=np.concatenate([a.exit_index for a in answers]),
             logits=np.concatenate([a.logits for a in answers]))
'''


@pytest.fixture(scope='module')
def device_python(tmp_path_factory):
    """Python of a fresh environment with the versions of this one."""
    place = tmp_path_factory.mktemp('venv')
    venv.create(place, with_pip=True)
    python = place / ('Scripts' if sys.platform == 'win32' else 'bin') / 'python'
    needed = [f'{name}=={version(name)}' for name in ('numpy', 'onnxruntime', 'pillow')]
    subprocess.run([python, '-m', 'pip', 'install', '-q', '--no-deps', *needed, 'flatbuffers', 'packaging', 'protobuf'],
                   check=True)
    assert subprocess.run([python, '-c', 'import torch'], capture_output=True).returncode
    return python


@pytest.fixture(scope='module')
def photos(cifar_root, tmp_path_factory):
    """For a data set: a folder with 2,000 of its test images."""
    places = {}

    def of(dataset):
        if dataset not in places:
            places[dataset] = tmp_path_factory.mktemp(dataset)
            for i, pixels in enumerate(open_splits(f'torch/{dataset}', cifar_root).test.pixels[:2000]):
                Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(places[dataset] / f'{i:04}.png')
        return places[dataset]
    return of


def backbone(folder):
    """Exits on a timm model of random weights, with statistics and scores of real images."""
    model = timm.create_model('multiexit', backbone=BACKBONE, at=2, num_classes=10)
    preprocess = Preprocessing.of(model)
    images = torch.stack([preprocess(path)[0] for path in sorted(folder.iterdir())[:200]])
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # one batch gives all statistics
    with torch.no_grad():
        model.train()(images[:64])
        logits = torch.stack([torch.cat(x) for x in zip(*(model.eval().forward_exits(x) for x in images.split(50)))])
    return model, ExitConfig.fit(logits, logits[-1].argmax(1), exit_costs(model))


@pytest.mark.exhaustive('70 s for the backbone on a free core: 2,000 images at three batch sizes')
@pytest.mark.parametrize('name', [*list_networks(pretrained=True), BACKBONE])
def test_exported_folder(name, device_python, photos, tmp_path, record_property):
    images = photos(name.partition('.')[2] or 'cifar10')
    model, config = backbone(images) if name == BACKBONE else (load_model(name), load_exit_config(name))
    budget = (config.exit_macs[0] + config.exit_macs[-1]) / 2
    export_folder(model, config, tmp_path / 'device', config.policy_for(budget) if name in MERGED else None)
    done = subprocess.run([device_python, '-I', '-c', DEVICE, tmp_path / 'device', images, str(budget)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    policy = config.policy_for(budget)
    run = EarlyExitRunner(model, policy, engine='onnx').run_folder(images)[1]
    exits, measured = run.exit_index.numpy(), []
    assert len(exits) == 2000 and len(set(exits)) > 1
    for size in BATCH_SIZES:
        answers = np.load(tmp_path / 'device' / f'answers_{size}.npz')
        same = answers['exits'] == exits
        apart = abs(answers['logits'] - run.logits.numpy())[same].max()
        measured.append(f'batch {size}: {(~same).sum()} exits differ, logits by up to {apart:.1e}')
        assert (~same).sum() <= 2 and apart <= 1e-4
    record_property('measured', '; '.join(measured))


@pytest.mark.exhaustive('30 s of CPU time each: compares times, for a quiet machine')
@pytest.mark.parametrize('name', list_networks(pretrained=True))
def test_merged_graphs_take_the_time_of_the_package(name, tmp_path, record_property):
    """Batch 1, when one exit is evaluated; and without merging, which costs a hand-over for each stage."""
    model, config = load_model(name), load_exit_config(name)
    engines = [OnnxEngine(model, threads=1)]
    for place, merged in ((tmp_path / 'merged', [(0, k) for k in range(1, model.num_exits)]), (tmp_path / 'plain', [])):
        place.mkdir()
        write_graphs(model, place, merged)
        engines.append(FolderEngine(place))
    image = np.random.default_rng(0).normal(size=(1, 3, 32, 32)).astype(np.float32)
    ratios = []
    for k in range(model.num_exits):
        rule = ExitPolicy.at_exit(k, model.num_exits, config.temperatures)
        for engine in engines:
            engine.build(segments_of(rule))
        times = take_turns({engine: partial(run_one, engine, rule, segments_of(rule), image) for engine in engines},
                           300, torch.device('cpu'), '')
        package, *folders = (np.median(times[engine]) for engine in engines)
        ratios.append([each / package for each in folders])
    merged, plain = (' '.join(f'{r:.2f}' for r in column) for column in zip(*ratios))
    record_property('measured', f'time against the package, by exit: merged {merged}, not merged {plain}')
    assert max(r for r, _ in ratios) < 1.1
