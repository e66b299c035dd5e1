"""The single ONNX file: the runner's answers, and only what they need runs."""
import json
import time

import numpy as np
import pytest
from conftest import calibrated_network

onnx, onnxruntime = map(pytest.importorskip, ('onnx', 'onnxruntime'))

from timm_multiexit import (  # noqa: E402
    EarlyExitRunner,
    ExitPolicy,
    InputError,
    exit_costs,
    list_networks,
    load_exit_config,
    load_model,
)
from timm_multiexit.cli import main  # noqa: E402
from timm_multiexit.data.splits import open_splits  # noqa: E402
from timm_multiexit.datasets import DATASETS, normalize  # noqa: E402
from timm_multiexit.inference.engine import make_engine  # noqa: E402
from timm_multiexit.inference.export import export_folder  # noqa: E402
from timm_multiexit.inference.single_file import export_single_file  # noqa: E402
from timm_multiexit.stopping.config import ExitConfig  # noqa: E402
from timm_multiexit.stopping.policy import ALWAYS, NEVER  # noqa: E402
from timm_multiexit.stopping.solve import budget_grid  # noqa: E402


def session(path, profile_prefix=''):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_profiling, options.profile_file_prefix = bool(profile_prefix), str(profile_prefix)
    return onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])


def answer(file, image, policy):
    return file.run(None, dict(image=image[None], thresholds=np.float32(policy.thresholds[:-1])))


def compare(file, model, policy, images, engine):
    """The exits, once all answers are the runner's; an image within 1e-4 of a threshold could leave elsewhere."""
    run = EarlyExitRunner(engine, policy, costs=exit_costs(model)).run(images)
    logits, exits, confidence = (np.concatenate(x) for x in zip(*(answer(file, x, policy) for x in images.numpy())))
    assert (exits - 1).tolist() == run.exit_index.tolist()
    np.testing.assert_allclose(logits, run.logits.numpy(), atol=1e-4)
    np.testing.assert_allclose(confidence, run.confidence.numpy(), atol=1e-5)
    return exits


@pytest.fixture(scope='module')
def network():
    return calibrated_network()


@pytest.fixture(scope='module')
def path(network, tmp_path_factory):
    path = tmp_path_factory.mktemp('single') / 'file.onnx'
    export_single_file(*network, path)
    return path


@pytest.fixture(scope='module')
def images(cifar_root):
    return normalize(open_splits('torch/cifar10', cifar_root).test.pixels[:50], (0.5,) * 3, (0.25,) * 3)


def test_it_answers_as_the_runner_does(path, network, images):
    model, config = network
    engine = make_engine(model, 'onnx')
    policies = [ExitPolicy.at_exit(k, 3, config.temperatures) for k in range(3)]
    confidences = np.sort(EarlyExitRunner(engine, policies[0], costs=exit_costs(model)).run(images).confidence)
    policies += [
        ExitPolicy.at_confidence(float((confidences[i] + confidences[i + 1]) / 2), config.temperatures)
        for i in (15, 40)]
    file = session(path)
    left = [set(compare(file, model, policy, images, engine)) for policy in policies]
    assert left[:3] == [{1}, {2}, {3}] and min(map(len, left[3:])) > 1


def test_only_what_an_answer_needs_runs(path, network, images, tmp_path):
    model, config = network
    folder = tmp_path / 'folder'
    export_folder(model, config, folder)
    stages, heads = ([sum(node.op_type == 'Conv' for node in onnx.load(folder / f'{kind}_{k}.onnx').graph.node)
                      for k in (1, 2, 3)] for kind in ('stage', 'head'))
    assert min(stages + heads) > 0
    for thresholds, last, seen in (
            ((ALWAYS, ALWAYS), 0, (0,)), ((NEVER, ALWAYS), 1, (1,)), ((NEVER / 4, ALWAYS), 1, (0, 1)),
            ((NEVER, NEVER), 2, (2,)), ((NEVER / 4, NEVER / 4), 2, (0, 1, 2))):
        file = session(path, tmp_path / 'profile')
        assert answer(file, images[0].numpy(), ExitPolicy((*thresholds, ALWAYS), config.temperatures))[1] == last + 1
        with open(file.end_profiling()) as events:
            ran = sum(event.get('args', {}).get('op_name', '').endswith('Conv') for event in json.load(events))
        assert ran == sum(stages[:last + 1]) + sum(heads[k] for k in seen)


def test_it_says_what_it_is(path, network):
    onnx.checker.check_model(str(path), full_check=True)
    model, config = network
    file = session(path)
    assert {v.name: v.shape for v in file.get_inputs()} == dict(image=[1, 3, 32, 32], thresholds=[2])
    assert {v.name: v.shape for v in file.get_outputs()} == dict(logits=[1, 10], exit=[1], confidence=[1])
    about = json.loads(file.get_modelmeta().custom_metadata_map['timm_multiexit'])
    assert about['class_names'] == list(config.class_names) and about['exit_macs'] == list(config.exit_macs)
    assert about['preprocessing']['input_size'] == [3, 32, 32]
    budgets = budget_grid(config.exit_macs[0], config.exit_macs[-1], 11)
    assert [policy['thresholds'] for policy in about['policies']] == [
        list(config.policy_for(budget).thresholds[:-1]) for budget in budgets]


def test_what_it_cannot_be_is_refused(network, tmp_path):
    model, config = network
    with pytest.raises(InputError, match="cannot measure confidence by 'margin'"):
        export_single_file(model, ExitConfig(config.exit_macs, config.exit_params, (3, 32, 32), config.temperatures,
                                             'margin'), tmp_path / 'file.onnx')
    with pytest.raises(InputError, match='no scores'):
        export_single_file(model, ExitConfig(config.exit_macs, config.exit_params, (3, 32, 32), config.temperatures),
                           tmp_path / 'file.onnx')
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope='module', params=list_networks(pretrained=True))
def shipped(request, tmp_path_factory):
    """A network with its weights, its exit config, the session of its file, and an engine."""
    path = tmp_path_factory.mktemp('shipped') / 'file.onnx'
    assert main(['export', request.param, '--single-file', str(path)]) == 0
    model = load_model(request.param)
    return request.param, model, load_exit_config(request.param), session(path), make_engine(model, 'onnx', threads=1)


def real_images(name, cifar_root, count):
    dataset = DATASETS[name.partition('.')[2]]
    return normalize(open_splits(dataset.name, cifar_root).test.pixels[:count], dataset.mean, dataset.std)


@pytest.mark.slow('40 s of CPU time each: exports a shipped network')
def test_shipped_networks(shipped, cifar_root):
    name, model, config, file, engine = shipped
    images = real_images(name, cifar_root, 200)
    for share in (0.3, 0.5, 0.8):
        assert len(set(compare(file, model, config.policy_for(share * config.exit_macs[-1]), images, engine))) > 1


@pytest.mark.exhaustive('40 s of CPU time each: compares times, for a quiet machine')
def test_an_image_that_leaves_first_takes_the_time_of_the_first_exit(shipped, cifar_root, record_property):
    name, model, _, file, engine = shipped
    engine.build([(0, 0)])
    alone = engine.sessions[0, 0][0]
    image = real_images(name, cifar_root, 1).numpy()
    at_once = dict(image=image, thresholds=np.full(model.num_exits - 1, ALWAYS, np.float32))
    runs = (lambda: alone.run(['logits0'], {engine.state_names[0][0]: image}), lambda: file.run(None, at_once))
    times = np.zeros((2, 500))
    for turn in range(500):
        for i, run in enumerate(runs):
            run()  # warms the caches
            start = time.perf_counter()
            run()
            times[i, turn] = time.perf_counter() - start
    expected, measured = 1e3 * np.median(times, axis=1)
    record_property('measured', f'{measured:.3f} ms, first stage and head alone {expected:.3f}')
    assert measured <= 1.15 * expected
