"""The figures stored with the weights are what the weights give: every network, engine and test image."""
import numpy as np
import pytest
import torch
from conftest import PROJECT

from timm_multiexit import EarlyExitRunner, ExitPolicy, list_networks, load_exit_config, load_model
from timm_multiexit.data.splits import open_splits
from timm_multiexit.datasets import DATASETS, normalize
from timm_multiexit.evaluation.results import Results
from timm_multiexit.inference.engine import make_engine


@pytest.mark.exhaustive('1 to 4 minutes of CPU time each: eight policies on 10,000 images')
@pytest.mark.parametrize('engine_name', ['torch', 'onnx'])
@pytest.mark.parametrize('name', list_networks(pretrained=True))
def test_published_figures(name, engine_name, cifar_root, record_property):
    stored = Results.load(PROJECT / 'timm_multiexit' / 'weights' / name / 'results.json')
    dataset = DATASETS[name.partition('.')[2]]
    test = open_splits(dataset.name, cifar_root).test
    images, targets = test.pixels, test.targets
    images = normalize(images, dataset.mean, dataset.std)
    model, config = load_model(name), load_exit_config(name)
    engine = make_engine(model, engine_name)
    costs = config.costs
    measured = []
    rows = stored.budgeted
    for row in [rows[i] for i in np.linspace(0, len(rows) - 1, 8).astype(int)]:
        policy = ExitPolicy(row.thresholds, config.temperatures, stored.measure)
        with torch.inference_mode():
            run = EarlyExitRunner(engine, policy, costs=costs).run(images)
        accuracy, macs = run.accuracy(targets), run.average_macs
        measured.append(f'{macs / 1e6:.2f} M {accuracy:.2f} %')
        # An image within rounding of a threshold may leave at another exit: at most three of 10,000 change.
        assert accuracy == pytest.approx(row.accuracy, abs=0.03)
        assert macs == pytest.approx(row.average_macs, rel=2e-4)
    record_property('measured', ', '.join(measured))
