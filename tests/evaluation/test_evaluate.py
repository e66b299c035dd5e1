"""evaluate and calibrate: a report holds the numbers of the network and of the policies, on real images."""
import argparse
import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from matplotlib.text import Text
from PIL import Image
from safetensors.torch import save_file
from torchvision.datasets import CIFAR10

from timm_multiexit.cli import main
from timm_multiexit.cli._common import add_model_options
from timm_multiexit.cli.evaluate import add_data_options, prepare
from timm_multiexit.data.images import Images
from timm_multiexit.data.splits import open_splits
from timm_multiexit.datasets import normalize
from timm_multiexit.errors import InputError
from timm_multiexit.evaluation import evaluate as evaluation
from timm_multiexit.evaluation.evaluate import LabelledLogits, calibration_error, oracle
from timm_multiexit.evaluation.figures import anytime_figure, budgeted_figure
from timm_multiexit.evaluation.results import OracleResult, Results
from timm_multiexit.inference.preprocess import Preprocessing
from timm_multiexit.models._costs import exit_costs
from timm_multiexit.models._pretrained import WEIGHTS_DIR
from timm_multiexit.pretrained.exit_config import load_recipe, weights_digest
from timm_multiexit.pretrained.load import load_model
from timm_multiexit.stopping.config import FILE_NAME, SCORES_NAME, ExitConfig
from timm_multiexit.stopping.costs import ExitCosts
from timm_multiexit.stopping.policy import ExitPolicy
from timm_multiexit.stopping.scores import UNKNOWN
from timm_multiexit.stopping.simulate import simulate

NAME = 'msfuse_cifar.cifar10'
FILES = ['anytime.png', 'budgeted.csv', 'budgeted.png', 'classes.csv', 'exits.csv', 'results.json']
PER_CLASS = 15


@pytest.fixture(scope='module')
def folder(tmp_path_factory, cifar_root):
    """A small data set in folders, train/CLASS/*.png and validation/CLASS/*.png, from CIFAR-10's test images."""
    root = tmp_path_factory.mktemp('images')
    dataset = CIFAR10(cifar_root, train=False)
    count = dict.fromkeys(dataset.classes, 0)
    for image, target in zip(dataset.data, dataset.targets):
        name = dataset.classes[target]
        if count[name] < 2 * PER_CLASS:
            split = root / ('train' if count[name] < PER_CLASS else 'validation') / name
            split.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(split / f'{count[name]:03d}.png')
            count[name] += 1
    return str(root)


@pytest.fixture(scope='module')
def options(folder):
    return ['--data-dir', folder, '--dataset', 'folder', '--validation-images', str(10 * PER_CLASS - 1)]


@pytest.fixture(scope='module')
def report(options, tmp_path_factory):
    output = tmp_path_factory.mktemp('report') / 'new'
    assert main(['evaluate', NAME, *options, '--batch-size', '64', '--guarantee', '--output', str(output)]) == 0
    return output


def test_the_report_is_complete_and_holds_the_network_s_numbers(report, folder):
    assert sorted(p.name for p in report.iterdir()) == FILES
    results = json.loads((report / 'results.json').read_text())
    model = load_model(NAME)
    test = Images(open_splits('folder', folder, model.pretrained_cfg['label_names'])['test'], Preprocessing.of(model))
    images, targets = test.stack()
    with torch.inference_mode():
        logits = torch.stack(model.forward_exits(
            normalize(images, model.pretrained_cfg['mean'], model.pretrained_cfg['std'])))
    costs = exit_costs(model)
    assert results['test_images'] == 10 * PER_CLASS == len(targets)
    assert [e['macs'] for e in results['exits']] == list(costs.macs)
    correct = 100. * (logits.argmax(2) == targets).double().mean(1)
    assert [e['accuracy'] for e in results['exits']] == pytest.approx(correct.tolist(), abs=1e-2)
    assert correct.min() > 40.  # trained weights
    # The budgeted rows are what their own thresholds give on these images.
    temperatures = [e['temperature'] for e in results['exits']]
    assert len(results['budgeted']) >= 25
    for row in results['budgeted'][::8]:
        result = simulate(ExitPolicy(row['thresholds'], temperatures), logits, costs.macs)
        assert row['average_macs'] == pytest.approx(result.average_macs, rel=2e-3)
        assert row['accuracy'] == pytest.approx(result.accuracy(targets), abs=0.7)  # one image of 150
        assert row['over_budget'] == pytest.approx(100. * (row['average_macs'] / row['budget'] - 1.), abs=0.01)


def test_tables_hold_what_the_json_holds(report):
    results = json.loads((report / 'results.json').read_text())
    with (report / 'exits.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert [float(r['accuracy']) for r in rows] == [e['accuracy'] for e in results['exits']]
    with (report / 'budgeted.csv').open() as file:
        rows = list(csv.DictReader(file))
    points = results['budgeted']
    assert [float(r['average_macs']) for r in rows] == [p['average_macs'] for p in points]
    shares = [[float(r[f'exit_share_{k}']) for k in range(1, 8)] for r in rows]
    assert shares == [p['exit_shares'] for p in points]
    assert all(sum(s) == pytest.approx(1., abs=1e-4) for s in shares)


def test_figures_draw_the_results(report):
    results = Results.load(report / 'results.json')
    (line,) = anytime_figure(results).axes[0].lines
    assert list(line.get_ydata()) == [e.accuracy for e in results.exits]
    axes = budgeted_figure(results).axes
    lines = {line.get_label(): line for line in axes[0].lines}
    assert list(lines['early exits by confidence'].get_ydata()) == [r.accuracy for r in results.budgeted]
    assert len(lines) == 3
    for name in ('anytime.png', 'budgeted.png'):
        with Image.open(report / name) as image:
            assert min(image.size) > 500 and len(image.convert('L').getcolors()) > 20


@pytest.mark.parametrize('draw', [anytime_figure, budgeted_figure])
def test_the_title_of_a_figure_is_not_cut_off(draw):
    name = 'msfuse_cifar_budgeted.cifar100'  # the longest that is shipped
    figure = draw(Results.load(WEIGHTS_DIR / name / 'results.json'))
    figure.draw_without_rendering()
    inside = figure.get_window_extent()
    (title,) = (text for text in figure.findobj(Text) if name in text.get_text())
    drawn = title.get_window_extent()
    assert inside.x0 < drawn.x0 and drawn.x1 < inside.x1


def test_an_interrupted_evaluation_leaves_no_half_file(options, tmp_path, monkeypatch):
    def interrupted(results):
        raise KeyboardInterrupt
    monkeypatch.setattr('timm_multiexit.evaluation.figures.anytime_figure', interrupted)
    assert main(['evaluate', NAME, *options, '--output', str(tmp_path / 'out')]) == 130
    whole = ['budgeted.csv', 'exits.csv', 'results.json']
    assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == whole


def test_calibrate_stores_scores_beside_a_checkpoint(options, tmp_path, capsys):
    model = load_model(NAME)
    save_file(model.state_dict(), tmp_path / 'mine.safetensors')
    code = main(['calibrate', NAME, '--checkpoint', str(tmp_path / 'mine.safetensors'), *options])
    assert code == 0 and 'written' in capsys.readouterr().out
    config = ExitConfig.load(tmp_path / FILE_NAME)
    config.check_network(model, weights_digest(model))
    assert config.scores.development.num_images == 149 and config.scores.for_certification.num_images == 0
    assert 20e6 < config.policy_for(25e6).expected_macs <= 25e6


def test_certification_images_make_a_promise(folder, tmp_path, capsys):
    """From what is stored with the weights and a folder of images; without labels, only of consistency."""
    output = tmp_path / FILE_NAME
    images = Path(folder) / 'validation'
    assert main(['calibrate', NAME, '--certify', str(images), '--output', str(output)]) == 0
    config = ExitConfig.load(output)
    assert config.scores.for_certification.num_images == 10 * PER_CLASS and config.scores.development.num_images == 2000
    assert (config.scores.for_certification.labels >= 0).all()
    assert main(['calibrate', NAME, '--certify', str(images), '--measure', 'entropy', '--output', str(output)]) == 2
    assert 'stored scores are of max_softmax: --measure entropy needs --data-dir' in capsys.readouterr().err
    ask = ['classify', str(next(images.glob('*/*.png'))), '--model', NAME, '--exit-config', str(output)]
    assert main([*ask, '--max-loss', '10']) == 0
    assert main([*ask, '--max-loss', '0.01']) == 2
    assert 'cannot be promised from 150 certification images' in capsys.readouterr().err
    misspelt = tmp_path / 'misspelt'
    shutil.copytree(images, misspelt)
    (misspelt / 'cat').rename(misspelt / 'cats')
    assert main(['calibrate', NAME, '--certify', str(misspelt), '--output', str(output)]) == 2
    assert "classes that the network was not trained on, 'cats'" in capsys.readouterr().err
    flat = tmp_path / 'flat'
    flat.mkdir()
    for number, path in enumerate(sorted(images.glob('*/*.png'))):
        shutil.copy(path, flat / f'{number}.png')
    assert main(['calibrate', NAME, '--certify', str(flat), '--output', str(output)]) == 0
    assert "risk 'consistency' only" in capsys.readouterr().out
    assert main([*ask, '--max-loss', '10']) == 2
    assert '150 of 150 certification images have no label' in capsys.readouterr().err
    assert main([*ask, '--max-loss', '10', '--risk', 'consistency']) == 0
    assert main([*ask[:4], '--max-loss', '1']) == 2
    assert 'calibrate MODEL --certify' in capsys.readouterr().err


def test_certification_images_beside_scores_that_are_missing_or_without_labels(folder, tmp_path, capsys):
    shutil.copytree(WEIGHTS_DIR / NAME, tmp_path / 'own')
    config = ExitConfig.load(tmp_path / 'own' / FILE_NAME)
    certify = ['calibrate', NAME, '--checkpoint', str(tmp_path / 'own' / 'model.safetensors'), '--certify',
               str(Path(folder) / 'validation' / 'cat')]
    (tmp_path / 'own' / SCORES_NAME).unlink()
    assert main(certify) == 2
    err = capsys.readouterr().err
    assert 'no scores are stored with these weights: run timm-multiexit' in err and len(err.splitlines()) == 1
    few = config.scores.subset(slice(300))
    replace(config, scores=replace(few, labels=np.full(300, UNKNOWN))).save(tmp_path / 'own' / FILE_NAME)
    assert main(certify) == 0
    rows = re.findall(r'^ *[0-9.]+ M( +)[0-9]+% ', capsys.readouterr().out, re.MULTILINE)
    assert len(rows) > 5 and {len(blank) for blank in rows} == {len('  top-1  ')}


def held_out(*args):
    parser = argparse.ArgumentParser()
    add_model_options(parser)
    add_data_options(parser)
    parser.add_argument('model')
    _, splits = prepare(parser.parse_args([*args]))
    return len(splits['development'])


def test_thresholds_are_set_on_the_images_that_the_run_held_out(tmp_path, folder, cifar_root):
    """By default; the weights have seen the other training images."""
    model = load_model(NAME)
    weights = tmp_path / 'model.safetensors'
    save_file(model.state_dict(), weights)
    mine = (NAME, '--checkpoint', str(weights), '--data-dir', cifar_root)
    assert held_out(*mine) == 5000
    (tmp_path / 'recipe.yaml').write_text('dataset: torch/cifar10\nvalidation_images: 700\n')
    assert held_out(*mine) == 700
    assert held_out(*mine, '--validation-images', '60') == 60
    assert held_out(*mine[:-1], folder, '--dataset', 'folder') == 15  # a tenth of other images
    shipped = yaml.safe_load((WEIGHTS_DIR / NAME / 'recipe.yaml').read_text())
    assert held_out(NAME, *mine[3:]) == shipped['validation_images'] > 0
    assert load_recipe(f'local-dir:{tmp_path}')['validation_images'] == 700
    (tmp_path / 'recipe.yaml').write_text('dataset: torch/cifar10\nvalidation_images: 0\n')
    with pytest.raises(InputError, match='no development images: all images were trained on'):
        held_out(*mine)
    (tmp_path / 'recipe.yaml').write_text('[')
    with pytest.raises(InputError, match='recipe .* cannot be read'):
        held_out(*mine)


@pytest.mark.parametrize('args, words', [
    (['evaluate', NAME, '--data-dir', '/nowhere'], "'torch/cifar10' cannot be read from '/nowhere'"),
    (['evaluate', 'msfuse', '--data-dir', '.'], 'did you mean msfuse_cifar'),
    (['evaluate', NAME, '--data-dir', '.', '--batch-size', '0'], 'argument --batch-size'),
    (['evaluate', NAME, '--data-dir', '.', '--validation-images', '0'], 'argument --validation-images'),
    (['calibrate', NAME, '--data-dir', '.'], 'pass that, or --output FILE'),
    (['calibrate', NAME, '--data-dir', '.', '--checkpoint', 'none.pth'], "'none.pth' is not a file"),
])
def test_bad_options_get_one_line(args, words, capsys):
    try:
        assert main(args) == 2
    except SystemExit as stop:  # from argparse
        assert stop.code == 2
    error = capsys.readouterr().err
    assert words in error and error.count('\n') == 1


def test_labels_of_another_data_set_are_refused(cifar_root, capsys):
    args = ['evaluate', NAME, '--data-dir', cifar_root, '--dataset', 'torch/cifar100', '--validation-images', '64']
    assert main(args) == 2
    assert "holds classes that the network was not trained on, 'apple'" in capsys.readouterr().err


def test_the_oracle_stops_at_the_first_correct_exit():
    targets = torch.tensor([0, 0, 0, 0])
    answers = torch.tensor([[0, 1, 1, 1], [1, 0, 1, 1], [0, 0, 0, 1]])  # no exit classifies the last image correctly
    test = LabelledLogits(torch.nn.functional.one_hot(answers, 2).float(), targets)
    assert oracle(test, (10, 20, 40)) == (
        OracleResult(exits=1, average_macs=10, accuracy=25.),
        OracleResult(exits=2, average_macs=round((10 + 3 * 20) / 4), accuracy=50.),
        OracleResult(exits=3, average_macs=round((10 + 20 + 2 * 40) / 4), accuracy=75.),
    )


def test_calibration_error_is_the_gap_between_confidence_and_accuracy():
    logits = torch.tensor([0.8, 0.2]).log().expand(1000, 2)
    targets = (torch.arange(1000) % 2).long()  # confidence 0.8, accuracy 0.5
    assert calibration_error(logits, targets) == pytest.approx(30., abs=0.1)
    assert calibration_error(logits, targets, temperature=100.) == pytest.approx(0., abs=0.5)


def test_temperature_removes_overconfidence():
    generator = torch.Generator().manual_seed(0)
    logits = 2. * torch.randn(3, 4000, 5, generator=generator)
    targets = torch.multinomial(logits[2].softmax(1), 1, generator=generator).squeeze(1)
    logits[2] *= 3.
    halves = [LabelledLogits(logits[:, part], targets[part]) for part in (slice(0, 2000), slice(2000, 4000))]
    results, _ = evaluation.evaluate(*halves, ExitCosts((10, 20, 40), (1, 2, 3), (3, 32, 32)))
    last = results.exits[2]
    assert last.temperature == pytest.approx(3., rel=0.1)
    assert last.calibration_error_with_temperature < 4. < 8. < last.calibration_error
