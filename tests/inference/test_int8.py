"""The exported folder in int8: small, close to the float network, with scores of its own."""
import json

import numpy as np
import pytest
import torch
from conftest import SAMPLES, calibrated_network
from device_support import on_device

onnx, onnxruntime = map(pytest.importorskip, ('onnx', 'onnxruntime'))

from timm_multiexit import InputError, load_model  # noqa: E402
from timm_multiexit.cli import main  # noqa: E402
from timm_multiexit.data.splits import open_splits  # noqa: E402
from timm_multiexit.datasets import DATASETS, normalize  # noqa: E402
from timm_multiexit.inference.device import FolderEngine, all_logits  # noqa: E402
from timm_multiexit.inference.quantize import HeldOut, export_int8_folder  # noqa: E402
from timm_multiexit.pretrained.exit_config import weights_digest  # noqa: E402
from timm_multiexit.stopping.config import ExitConfig  # noqa: E402
from timm_multiexit.stopping.simulate import simulate  # noqa: E402


@pytest.fixture(scope='module')
def network():
    return calibrated_network()


@pytest.fixture(scope='module')
def held_out(cifar_root):
    """For ranges, for scores, and for a guarantee."""
    test = open_splits('torch/cifar10', cifar_root).test
    return [[(test.pixels[i:j], test.targets[i:j])] for i, j in ((0, 64), (64, 264), (264, 300))]


@pytest.fixture(scope='module')
def int8(network, held_out, tmp_path_factory):
    place = tmp_path_factory.mktemp('int8') / 'device'
    report = export_int8_folder(*network, place, HeldOut(*held_out), batch_sizes=(2,))
    return place, report


def seen(engine, batches):
    """Logits of all exits on batches."""
    how = engine.graphs['preprocessing']
    return np.concatenate([all_logits(engine, normalize(x, how['mean'], how['std']).numpy()) for x, _ in batches], 1)


def test_int8_graphs_are_small_and_close(int8, exported, held_out):
    size = {place: sum(path.stat().st_size for path in place.glob('*.onnx')) for place in (int8[0], exported)}
    assert size[int8[0]] < size[exported]
    before, after = (seen(FolderEngine(place), held_out[1]) for place in (exported, int8[0]))
    for exit_before, exit_after in zip(before, after):
        spread = (exit_before - exit_before.mean(0)).std()  # over images
        assert 0. < abs(exit_after - exit_before).mean() < 0.25 * spread


def test_int8_scores_are_those_of_the_quantised_network(int8, network, held_out):
    place, report = int8
    config = ExitConfig.load(place / 'multiexit.json')
    logits = seen(FolderEngine(place), [*held_out[1], *held_out[2]])
    labels = np.concatenate([y for _, y in held_out[1] + held_out[2]])
    kept = np.arange(len(labels)) >= 200
    expected = ExitConfig.fit(
        list(logits), labels, network[1].costs, network[1].class_names, certification=kept, weights=config.weights)
    assert config == expected and config.temperatures != network[1].temperatures
    with pytest.raises(InputError, match='other weights'):  # its thresholds are not for the float network
        config.check_network(network[0], weights_digest(network[0]))
    assert report.images == 200
    assert [after for _, after in report.accuracies] == pytest.approx(
        (100. * (logits.argmax(2) == labels)[:, ~kept].mean(1)).tolist())
    assert set(report.times) == {2} and min(report.times[2]) > 0.


def test_ranges_are_of_the_states_that_a_stage_receives(int8, exported, held_out):
    engine = FolderEngine(exported)
    how = engine.graphs['preprocessing']
    x = normalize(held_out[0][0][0], how['mean'], how['std']).numpy()
    extremes = []
    for batch in np.split(x, 4):
        state = engine.run(0, 1, engine.start(batch))[0]
        extremes.append([(m.min(), m.max()) for m in state])
    graph = onnx.load(int8[0] / 'stage_3.onnx').graph
    values = {value.name: onnx.numpy_helper.to_array(value) for value in graph.initializer}
    scale = {node.input[0]: values[node.input[1]] for node in graph.node if node.op_type == 'QuantizeLinear'}
    for name, (low, high) in zip(engine.states[2], np.mean(extremes, 0)):
        assert scale[name] == pytest.approx((max(high, 0.) - min(low, 0.)) / 255., rel=1e-3)


def test_int8_leaves_the_first_convolutions_in_float(int8, network, held_out, tmp_path):
    export_int8_folder(*network, tmp_path / 'vnni', HeldOut(*held_out), vnni=True, batch_sizes=())
    largest = {}
    for place in (int8[0], tmp_path / 'vnni'):
        in_float = []
        for path in sorted(place.glob('*.onnx')):
            graph = onnx.load(path).graph
            made = {name: node.op_type for node in graph.node for name in node.output}
            in_float += [path.name for node in graph.node
                         if node.op_type == 'Conv' and made.get(node.input[1]) != 'DequantizeLinear']
            weights = [onnx.numpy_helper.to_array(v) for v in graph.initializer
                       if v.data_type == onnx.TensorProto.INT8 and len(v.dims) > 1]
            largest[place] = max([largest.get(place, 0), *(abs(w.astype(int)).max() for w in weights)])
        assert in_float == ['stage_1.onnx'] * 4
    assert largest[int8[0]] == 64 and largest[tmp_path / 'vnni'] >= 127  # of 7 and of 8 bits


def test_the_int8_folder_runs_and_checks_itself(int8):
    done = on_device(int8[0], '--check')
    assert done.returncode == 0 and done.stderr.startswith('run.py: check: 0 of 10'), done.stderr
    config = ExitConfig.load(int8[0] / 'multiexit.json')
    done = on_device(int8[0], SAMPLES, '--average-budget', sum(config.exit_macs[::2]) / 2, '--json')
    assert done.returncode == 0 and len(json.loads(done.stdout)) == 10, done.stderr


@pytest.mark.parametrize('options', [['--int8'], ['--vnni'], ['--certify', 'photos'], ['--int8', '--data-dir', 'none']])
def test_int8_options_that_cannot_be_used(options, tmp_path, capsys):
    assert main(['export', 'msfuse_cifar_budgeted', '--output', str(tmp_path / 'out'), *options]) == 2
    assert capsys.readouterr().err.count('\n') == 1 and not (tmp_path / 'out').exists()


@pytest.mark.slow('60 s of CPU time: the shipped network in int8, on 2,000 test images')
def test_a_shipped_network_in_int8(cifar_root, tmp_path, capsys):
    place, photos = tmp_path / 'out', tmp_path / 'photos'
    everything, names = open_splits('torch/cifar10', cifar_root).test, DATASETS['cifar10'].classes
    for i in range(1, 400, 20):  # not among those below
        path = photos / names[everything.targets[i]] / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        everything.sources[i].save(path)
    assert main(['export', 'msfuse_cifar.cifar10', '--int8', '--data-dir', cifar_root, '--certify', str(photos),
                 '--output', str(place)]) == 0
    printed = capsys.readouterr().out
    assert 'accuracy on 1,744 held-out images; ranges are of 256 others' in printed and 'batches of 256' in printed
    assert sum(p.stat().st_size for p in place.rglob('*') if p.is_file()) <= 6e6
    dataset, test = DATASETS['cifar10'], everything.some(2000)
    labels, model = test.targets.numpy(), load_model('msfuse_cifar.cifar10')
    x = normalize(test.pixels, dataset.mean, dataset.std)
    with torch.inference_mode():
        before = torch.cat([torch.stack(model.forward_exits(part)) for part in x.split(250)], 1).numpy()
    after = seen(FolderEngine(place), zip(test.pixels.split(250), test.targets.split(250)))
    lost = 100. * ((before.argmax(2) == labels).mean(1) - (after.argmax(2) == labels).mean(1))
    # On all 10,000: 0.06 to 0.21 points at an exit, and at most 2.2 % from the budget.
    assert lost.mean() < 0.5 and lost.max() < 1.
    config = ExitConfig.load(place / 'multiexit.json')
    assert config.scores.for_certification.num_images == 20 and (config.scores.for_certification.labels >= 0).all()
    for budget in (20e6, 25e6, 30e6, 40e6):
        assert simulate(config.policy_for(budget), after, config.exit_macs).average_macs == pytest.approx(
            budget, rel=0.03)
