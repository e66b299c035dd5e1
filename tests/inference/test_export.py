"""The exported folder: the answers of the package, in a process that has NumPy, Pillow and onnxruntime alone."""
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from conftest import SAMPLES, SMALL, calibrated_network
from device_support import BLOCKED, on_device
from killer import Killer
from PIL import Image

onnx, onnxruntime = map(pytest.importorskip, ('onnx', 'onnxruntime'))

from timm_multiexit import EarlyExitRunner, InputError, load_exit_config, load_model  # noqa: E402
from timm_multiexit.cli import main  # noqa: E402
from timm_multiexit.files import sha256  # noqa: E402
from timm_multiexit.inference.batch_loop import run_batch, segments_of  # noqa: E402
from timm_multiexit.inference.device import FolderEngine, preprocess, processor, resized  # noqa: E402
from timm_multiexit.inference.export import COPIED, PACKAGE, export_folder  # noqa: E402
from timm_multiexit.inference.preprocess import Preprocessing  # noqa: E402
from timm_multiexit.stopping.policy import ALWAYS, NEVER, ExitPolicy  # noqa: E402
from timm_multiexit.stopping.scores import ExitScores  # noqa: E402


@pytest.fixture(scope='module')
def network():
    return calibrated_network()


@pytest.fixture(scope='module')
def folder(network, tmp_path_factory):
    place = tmp_path_factory.mktemp('export') / 'device'
    export_folder(*network, place)
    return place


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    """Twelve photos of differing sizes."""
    place = tmp_path_factory.mktemp('photos')
    rng = np.random.default_rng(0)
    for i in range(12):
        pixels = rng.integers(256, size=(8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((30 + 7 * i, 60 - 2 * i), Image.Resampling.BICUBIC).save(place / f'{i:02}.png')
    return place


@pytest.mark.parametrize('batch_size', [1, 7, 12])
def test_the_folder_answers_as_the_runner_does(folder, network, photos, batch_size):
    model, config = network
    budget = (config.exit_macs[0] + config.exit_macs[-1]) / 2
    done = on_device(folder, photos, '--average-budget', budget, '--batch-size', batch_size, '--json')
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    run = EarlyExitRunner(model, config.policy_for(budget), engine='onnx').run_folder(photos)[1]
    assert [r['exit'] - 1 for r in results] == run.exit_index.tolist()
    assert [r['label'] for r in results] == [f'k{k}' for k in run.prediction.tolist()]
    assert [r['probability'] for r in results] == pytest.approx(run.confidence.tolist(), abs=1e-5)
    assert [r['macs'] for r in results] == run.macs.tolist()


def test_merged_graphs_give_the_same_answers(folder, network, tmp_path):
    model, config = network
    rng = np.random.default_rng(0)
    images = rng.normal(size=(40, 3, 32, 32)).astype(np.float32)
    for thresholds, merged in (((NEVER, 0., ALWAYS), [(0, 1)]), ((0., NEVER, ALWAYS), [(1, 2)]),
                               ((NEVER, NEVER, ALWAYS), [(0, 2)]), ((0., 0., ALWAYS), [])):
        rule, place = ExitPolicy(thresholds, config.temperatures), tmp_path / 'merged'
        export_folder(model, config, place, rule)
        assert {p.name for p in place.glob('*_to_*')} == {f'stage_{a + 1}_to_{b + 1}.onnx' for a, b in merged}
        plain, ours = (run_batch(FolderEngine(each), rule, segments_of(rule), images, 8) for each in (folder, place))
        assert len(set(plain.exit_index)) == len(segments_of(rule))
        for a, b in zip(plain, ours):
            np.testing.assert_array_equal(a, b)


def test_a_monitor_reports_and_caps(folder, network, photos):
    """All twelve would run to the end; four carry the average above the limit, so the next leave at once."""
    macs = network[1].exit_macs
    limit = ['--batch-size', 4, '--max-average', (macs[0] + macs[-1]) / 2]
    free, capped = (on_device(folder, photos, '--json', '--monitor', *extra) for extra in ([], limit))
    spent = [[r['macs'] for r in json.loads(done.stdout)] for done in (free, capped)]
    assert spent[0] == [macs[-1]] * 12 and spent[1][:8] == [macs[-1]] * 4 + [macs[0]] * 4
    assert '12 images left at exits 1 to 3: 0 0 100 %, expected 0 0 100 %' in free.stderr
    refused = on_device(folder, photos, '--max-average', '1k')
    assert refused.returncode == 2 and 'the first exit costs' in refused.stderr


def test_its_profile_answers_in_time(folder, photos):
    (folder / 'profile.json').unlink(missing_ok=True)
    done = on_device(folder, photos / '00.png', '--average-latency', '50%')
    assert done.returncode == 2 and 'has no times of this machine: run its run.py --profile first' in done.stderr
    done = on_device(folder, '--profile')
    assert done.returncode == 0 and 'ms for the full network' in done.stderr
    full = float(done.stderr.split(' ms')[0])
    assert on_device(folder, photos / '00.png', '--average-latency', f'{0.8 * full}ms').returncode == 0
    times = (folder / 'profile.json').read_text()
    (folder / 'profile.json').write_text(times.replace('"processor": "', '"processor": "another '))
    done = on_device(folder, photos / '00.png', '--average-latency', '50%')
    assert done.returncode == 2 and 'has no times of this machine' in done.stderr
    (folder / 'profile.json').write_text(times)
    done = on_device(folder, photos / '00.png', '--average-latency', '1000ms')
    assert done.returncode == 2 and 'cannot be kept' in done.stderr


@pytest.mark.parametrize('size', [(32, 32), (37, 91), (91, 37), (200, 31), (48, 32)])
@pytest.mark.parametrize('interpolation, crop_pct', [('bilinear', 1.), ('bicubic', 0.875)])
@pytest.mark.parametrize('seen', [(32, 32), (24, 40)])
def test_images_are_prepared_as_in_the_package(size, interpolation, crop_pct, seen):
    image = Image.fromarray(np.random.default_rng(0).integers(256, size=(*size, 3), dtype=np.uint8))
    config = dict(input_size=(3, *seen), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation=interpolation,
                  crop_pct=crop_pct, crop_mode='center')
    expected = Preprocessing(config).pixels(image).permute(1, 2, 0).numpy()
    ours = resized(image, seen, crop_pct, Image.Resampling[interpolation.upper()])
    np.testing.assert_array_equal(np.asarray(ours), expected)


def test_what_the_network_sees_is_equal_to_the_bit(folder, network, photos):
    how = FolderEngine(folder).graphs['preprocessing']
    for path in sorted(photos.iterdir()):
        np.testing.assert_array_equal(preprocess(path, how)[0], Preprocessing.of(network[0])(path)[0].numpy())


def test_the_modules_are_the_package_s_own(folder):
    copied = [p for pattern in COPIED for p in PACKAGE.glob(pattern)]
    assert len(copied) > 10
    for source in copied:
        assert (folder / 'timm_multiexit' / source.relative_to(PACKAGE)).read_bytes() == source.read_bytes()


def test_a_folder_is_replaced_whole_and_no_other(folder, network, tmp_path):
    reader = FolderEngine(shutil.copytree(folder, tmp_path / 'twice'))
    reader.build([(0, 0)])
    torch.manual_seed(1)
    other = timm.create_model('msfuse_cifar', **SMALL).eval()
    export_folder(other, network[1], tmp_path / 'twice')
    assert [p.name for p in tmp_path.iterdir()] == ['twice']
    FolderEngine(tmp_path / 'twice').build([(0, 2)])
    with pytest.raises(InputError, match="stage_2.onnx' is damaged"):  # never half of one network, half of another
        reader.build([(1, 2)])
    (tmp_path / 'link').symlink_to('twice')
    export_folder(other, network[1], tmp_path / 'link')
    assert (tmp_path / 'link').is_symlink() and (tmp_path / 'twice' / 'run.py').exists()
    with pytest.raises(InputError, match='is a mount point'):
        export_folder(*network, '/')
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'notes.txt').write_text('mine')
    with pytest.raises(InputError, match='holds something other than an earlier export'):
        export_folder(*network, tmp_path / 'mine')


@pytest.mark.slow('30 s of CPU time: eight exports')
def test_a_kill_leaves_the_export_before_or_the_new_one(folder, network, tmp_path):
    """Killed before some operations on files, and before each of the last four, where the folder changes its name."""
    place = shutil.copytree(folder, tmp_path / 'device')
    before = (place / 'graphs.json').read_text()
    torch.manual_seed(1)
    other = timm.create_model('msfuse_cifar', **SMALL).eval()
    with Killer(tmp_path) as operations:
        export_folder(other, network[1], place)
    after = (place / 'graphs.json').read_text()
    count = len(operations.done)
    renames = [k for k, done in enumerate(operations.done) if done[0] == 'os.rename' and done[1].endswith('device')]
    assert after != before and len(renames) == 1
    for k in (0, count // 3, *range(count - 4, count)):
        shutil.rmtree(tmp_path)
        shutil.copytree(folder, place)
        with Killer(tmp_path, k):
            export_folder(other, network[1], place)
        if k == renames[0] + 1:  # between its two renames there is none, never half of one
            assert not place.exists()
        else:
            assert (place / 'graphs.json').read_text() == (before if k <= renames[0] else after)
            FolderEngine(place).build([(0, 2)])
    export_folder(other, network[1], place)
    assert (place / 'graphs.json').read_text() == after


def replace_operator(folder, name):
    """A graph, with its checksum, that needs an operator which this onnxruntime lacks."""
    graph, graphs = onnx.load(folder / name), json.loads((folder / 'graphs.json').read_text())
    graph.graph.node[0].op_type = 'OfTomorrow'
    onnx.save(graph, folder / name)
    graphs['sha256'][name] = sha256(folder / name)
    (folder / 'graphs.json').write_text(json.dumps(graphs))


def test_a_device_that_answers_otherwise_is_found(folder, tmp_path):
    done = on_device(folder, '--check')
    assert done.returncode == 0 and done.stderr.startswith('run.py: check: 0 of 10 sample images'), done.stderr
    assert f'{processor()} with onnxruntime {onnxruntime.__version__}' in done.stderr
    copy = shutil.copytree(folder, tmp_path / 'copy')
    stored = ExitScores.load(copy / 'samples.safetensors')[0]
    scores = stored.scores.copy()
    scores[:, :2] = 20.  # two images so easy that they left at the first exit in use
    replace(stored, scores=scores).save(copy / 'samples.safetensors')
    done = on_device(copy, '--check')
    assert done.returncode == 1 and done.stderr.startswith('run.py: warning: 2 of 10 sample images'), done.stderr
    next((copy / 'samples').iterdir()).unlink()
    done = on_device(copy, '--check')
    assert done.returncode == 2 and 'holds other images than' in done.stderr and done.stderr.count('\n') == 1


def test_a_device_without_onnxruntime_is_told(folder, photos):
    code = BLOCKED.replace("'onnxruntime', ", '')
    done = subprocess.run([sys.executable, '-I', '-c', code, str(folder / 'run.py'), str(photos / '00.png')],
                          capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        2, 'run.py: error: onnxruntime is not installed: python -m pip install onnxruntime\n')


def rename_classes(place, names):
    path = place / 'multiexit.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), 'class_names': names}))


@pytest.mark.parametrize('spoil, words', [
    (lambda f: (f / 'stage_2.onnx').write_bytes((f / 'stage_2.onnx').read_bytes()[:-9]), "stage_2.onnx' is damaged"),
    (lambda f: (f / 'head_1.onnx').write_bytes((f / 'head_2.onnx').read_bytes()), "head_1.onnx' is damaged"),
    (lambda f: (f / 'stage_3.onnx').unlink(), "stage_3.onnx' is missing"),
    (lambda f: (f / 'graphs.json').write_text('{}'), 'is not of an export'),
    (lambda f: (f / 'graphs.json').unlink(), 'holds no graphs.json: give a folder that timm-multiexit export wrote'),
    (lambda f: (f / 'multiexit.json').write_text('{"version": 1}'), 'version 1'),
    (lambda f: (f / 'multiexit.json').unlink(), "multiexit.json' cannot be read"),
    (lambda f: (f / 'scores.safetensors').unlink(), 'no scores are stored'),
    (lambda f: (f / 'scores.safetensors').write_bytes((f / 'scores.safetensors').read_bytes()[:-9]), 'cannot be read'),
    (lambda f: replace_operator(f, 'head_1.onnx'), 'cannot run head_1.onnx'),
    (lambda f: rename_classes(f, ['cat', 'dog']), 'an exit config for 2 classes does not fit a network with'),
])
def test_faults_of_the_folder_end_in_one_line(network, tmp_path, photos, spoil, words, folder):
    copy = shutil.copytree(folder, tmp_path / 'copy')
    spoil(copy)
    done = on_device(copy, photos / '00.png', '--average-budget', network[1].exit_macs[-1] * 0.8)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count('\n') == 1


def test_bad_images_and_options_end_in_one_line(folder, photos, tmp_path):
    (tmp_path / 'bad.png').write_text('no image')
    (tmp_path / 'half.png').write_bytes((photos / '02.png').read_bytes()[:500])
    done = on_device(folder, tmp_path / 'bad.png', photos / '01.png', tmp_path / 'half.png', '--json')
    results = json.loads(done.stdout)
    assert done.returncode == 2 and ['error' in r for r in results] == [True, False, True]
    for args in ((), ('--budget', ''), ('--average-budget', ''), ('--average-latency', ''), ('--budget', '1'),
                  ('--average-budget', '1G'), ('--average-latency', 'soon'), ('--max-loss', '1')):
        done = on_device(folder, *([photos / '01.png'] if args else []), *args)
        assert done.returncode == 2 and done.stderr.startswith('run.py: error: ') and done.stderr.count('\n') == 1


@pytest.mark.slow('40 s: exports the shipped network')
def test_the_command_exports_a_shipped_network(tmp_path, capsys):
    assert main(['export', 'msfuse_cifar_budgeted', '--output', str(tmp_path / 'out')]) == 0
    samples = sorted(map(str, SAMPLES.glob('*.png')))
    results = json.loads(on_device(tmp_path / 'out', *samples, '--average-budget', '12M', '--json').stdout)
    policy = load_exit_config('msfuse_cifar_budgeted').policy_for(12e6)
    run = EarlyExitRunner(load_model('msfuse_cifar_budgeted'), policy, engine='onnx').run_folder(SAMPLES)[1]
    assert [r['exit'] - 1 for r in results] == run.exit_index.tolist()
    assert sum(p.stat().st_size for p in (tmp_path / 'out').rglob('*') if p.is_file()) < 21e6
