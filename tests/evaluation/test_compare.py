"""compare: equal cost and equal accuracy from results, stored or made from logits, and what cannot be compared."""
import contextlib
import csv
import dataclasses
import json

import numpy as np
import pytest
from conftest import PROJECT

from timm_multiexit.cli import main
from timm_multiexit.errors import InputError
from timm_multiexit.evaluation.compare import (
    Entry,
    check_comparable,
    comparison_rows,
    joined_runs,
    saved,
    time_budgets,
)
from timm_multiexit.evaluation.evaluate import evaluate
from timm_multiexit.evaluation.figures import comparison_figure
from timm_multiexit.evaluation.logits_file import read_logits
from timm_multiexit.evaluation.published import PUBLISHED
from timm_multiexit.evaluation.results import BudgetResult, Results
from timm_multiexit.stopping.costs import StageCosts
from timm_multiexit.stopping.policy import ALWAYS, NEVER

WEIGHTS = PROJECT / 'timm_multiexit' / 'weights'
NAMES = ['msfuse_cifar.cifar100', 'msfuse_cifar_budgeted.cifar100']


def entry(name, *points, **changes):
    """A network whose budget curve has these (M MACs, accuracy)."""
    stored = Results.load(WEIGHTS / NAMES[0] / 'results.json')
    rows = tuple(dataclasses.replace(stored.budgeted[0], average_macs=round(x * 1e6), accuracy=y) for x, y in points)
    return Entry(name, (dataclasses.replace(stored, budgeted=rows, **changes),))


def results_of(path, measure='max_softmax'):
    validation, test, costs, _ = read_logits(path)
    return evaluate(validation, test, costs, measure=measure)[0]


def test_equal_cost_and_equal_accuracy():
    one, other = entry('one', (10, 60.), (20, 70.), (30, 69.), (40, 72.)), entry('other', (20, 60.), (40, 70.))
    assert one.accuracies_at(15e6) == 65. and one.accuracies_at(30e6) == 70.  # the best so far
    assert np.isnan(one.accuracies_at(9e6)) and one.accuracies_at(50e6) == 72.
    assert one.cost_at(65.) == 15e6 and one.cost_at(60.) == 10e6 and np.isnan(one.cost_at(73.))
    assert one.cost_at(71.) == pytest.approx(35e6)
    rows = comparison_rows([one, other])
    assert [row['macs'] for row in rows] == [10e6 + i * 30e6 / 8 for i in range(9)]
    assert rows[0] == {'macs': 10e6, 'one': 60., 'other': None}
    assert rows[4] == {'macs': 25e6, 'one': 70., 'other': 62.5}
    halves = {row['accuracy']: row for row in saved(one, other)}
    assert list(halves) == [60. + i / 2 for i in range(21)]
    assert (halves[65.]['own'], halves[65.]['its'], halves[65.]['share']) == (15e6, 30e6, 0.5)
    apart = entry('apart', (50, 80.), (60, 90.))
    assert comparison_rows([one, apart])[-1] == {'macs': 60e6, 'one': 72., 'apart': 90.} and saved(one, apart) == []
    point = entry('point', (30, 60.3))
    assert comparison_rows([point, point]) == [{'macs': 30e6, 'point': 60.3}] and saved(one, point) == []


def test_runs_of_one_network_have_a_mean_and_a_spread():
    runs = [entry('one', (10, 60.), (20, 70.)), entry('one', (10, 62.), (16, 71.)), entry('one', (10, 64.), (21, 72.))]
    other = entry('other', (10, 60.), (20, 64.))
    one, alone = joined_runs([runs[0], other, *runs[1:]])
    assert (len(one.runs), alone) == (3, other)
    assert one.accuracies_at(13e6).tolist() == pytest.approx([63., 66.5, 64 + 8 * 3 / 11])
    assert one.curve().tolist() == [[10e6, 19e6], [62., 71.], [60., 70.], [64., 72.]]
    assert one.cost_at(66.5) == 14.5e6 and one.cost_at(71.) == 19e6 and np.isnan(one.cost_at(71.01))
    row = comparison_rows([one, alone])[0]
    assert row == {'macs': 10e6, 'one': 62., 'one ±': 2., 'other': 60.}
    (ax,) = comparison_figure([one, alone], 'budgeted').axes
    (band,) = ax.collections
    assert {tuple(v) for v in band.get_paths()[0].vertices} >= {(10., 60.), (10., 64.), (19., 70.), (19., 72.)}
    assert [line.get_label() for line in ax.lines[-2:]] == ['one (mean of 3 runs, lowest to highest)', 'other']
    exits = [dataclasses.replace(e, accuracy=e.accuracy + 1.) for e in one.results.exits]
    two = joined_runs([runs[0], entry('one', (10, 61.), (20, 70.), exits=tuple(exits))])[0].exits()
    assert two[1] == pytest.approx(two[2] + 0.5) and two[1] == pytest.approx(two[3] - 0.5)


def test_runs_keep_their_times():
    timed = [dataclasses.replace(entry('one', (10, 60.), (20, y)), milliseconds=(np.array([1., ms]),))
             for y, ms in ((70., 2.), (80., 3.))]
    one = joined_runs(timed)[0]
    assert one.curve(time=True)[:2].tolist() == [[1., 2.5], [60., 75.]]
    assert one.accuracies_at(2., time=True).tolist() == [70., 70.]


def test_the_mean_of_runs_reaches_its_own_best():
    """69.1, 70.3 and 70.6 have the mean 70, and 69.99999999999999 in floats."""
    one = joined_runs([entry('one', (10, 60.), (20, y)) for y in (69.1, 70.3, 70.6)])[0]
    assert one.front()[1][-1] < 70. and one.cost_at(70.) == pytest.approx(20e6)


def test_results_of_three_seeds_in_one_table(tmp_path, capsys):
    stored = Results.load(WEIGHTS / NAMES[0] / 'results.json')
    files = []
    for seed in range(3):
        rows = tuple(dataclasses.replace(r, accuracy=r.accuracy - seed) for r in stored.budgeted)
        files.append(str(tmp_path / str(seed) / 'results.json'))
        dataclasses.replace(stored, budgeted=rows).save(files[-1])
    output = ['--output', str(tmp_path / 'out')]
    assert main(['compare', *(f'mine={file}' for file in files), NAMES[0], *output]) == 0
    printed = capsys.readouterr().out
    assert f'mine against {NAMES[0]}' in printed and '±1.00' in printed and 'of a single run' in printed
    written = json.loads((tmp_path / 'out' / 'comparison.json').read_text())
    assert (written['networks'], written['runs']) == (['mine', NAMES[0]], [3, 1])
    assert main(['compare', *(f'mine={file}' for file in files), *output]) == 0  # the spread alone
    capsys.readouterr()
    for given, words in [
            (files[:2], f"two networks are called '{NAMES[0]}': give each a name, NAME={files[1]}"),
            ([files[0]] * 2, 'is given twice'), ([f'macs={files[0]}', NAMES[0]], "cannot be called 'macs'"),
            ([f'mine={files[0]}', f'mine={NAMES[1]}'], "runs of 'mine' are of different networks")]:
        assert main(['compare', *given, *output]) == 2
        assert words in capsys.readouterr().err


def test_stopping_rules_side_by_side(tmp_path, capsys):
    """Agreement by hand: with two exits to agree an image leaves at the first that repeats the one before it."""
    stored = save_logits(tmp_path / 'theirs.npz')
    rules = ['max_softmax', 'entropy', 'margin', 'agreement']
    assert main(['compare', str(tmp_path / 'theirs.npz'), '--measure', ','.join(rules), '--output',
                 str(tmp_path / 'out')]) == 0
    printed = capsys.readouterr().out
    assert all(f'theirs, {rule}' in printed for rule in rules)
    results = results_of(tmp_path / 'theirs.npz', 'agreement')
    said, labels = stored['logits'].argmax(2)[:, 200:], stored['labels'][200:]
    alike = said[0] == said[1]
    answers, costs = np.where(alike, said[1], said[2]), np.where(alike, 2e6, 4e6)
    assert [round(100 * (answers == labels).mean(), 3), round(costs.mean())] == [
        results.budgeted[0].accuracy, results.budgeted[0].average_macs]
    assert [row.thresholds for row in results.budgeted] == [(1., 1., 1.), (2., 2., 2.)]
    assert results.budgeted[1].average_macs == 4e6  # all three must agree: only the last exit answers
    lines = {kind: [line.get_label() for line in comparison_figure(joined_runs(
        [Entry('theirs', (results_of(tmp_path / 'theirs.npz', rule),)) for rule in rules]), kind).axes[0].lines]
        for kind in ('anytime', 'budgeted')}
    assert lines == dict(anytime=['theirs'], budgeted=[f'theirs, {rule}' for rule in rules])
    one = save_logits(tmp_path / 'one.npz', logits=stored['logits'][:1], macs=np.array([10**6]))
    assert len(one['logits']) == 1
    for argv, words in [
            ([*NAMES, '--measure', 'entropy'], 'holds results of max_softmax alone'),
            ([*NAMES, '--measure', 'doubt'], "unknown stopping rule 'doubt'"),
            ([str(tmp_path / 'one.npz'), '--measure', 'agreement'], 'needs two exits or more')]:
        with contextlib.suppress(SystemExit):
            assert main(['compare', *argv, '--output', str(tmp_path / 'none')]) == 2
        assert words in capsys.readouterr().err


def test_logits_join_networks_measured_on_the_same_images(tmp_path, capsys):
    results = Results.load(WEIGHTS / NAMES[0] / 'results.json')
    logits = np.random.default_rng(0).normal(size=(2, results.test_images + 50, 10))
    rows = dict(labels=np.arange(logits.shape[1]) % 10, held_out=np.arange(logits.shape[1]) < 50,
                macs=np.array([10**7, 3 * 10**7]))
    save_logits(tmp_path / 'theirs.npz', logits=logits, **rows)
    command = ['compare', NAMES[0], str(tmp_path / 'theirs.npz'), '--output', str(tmp_path / 'out')]
    assert main(command) == 2
    assert "name it in the .npz file, as 'dataset'" in capsys.readouterr().err
    save_logits(tmp_path / 'theirs.npz', logits=logits, dataset=results.dataset, **rows)
    assert main(command) == 0
    assert f'of {results.dataset}' in capsys.readouterr().out


def test_time_counts_the_stages_run_and_the_heads_evaluated():
    """By hand: half of the images leave at exit 1, the rest at exit 3; exit 2 is not used, so its head does not run."""
    row = BudgetResult(20., 20, 90., 0., 20., 90., (0.5, 0., 0.5), (1., NEVER, ALWAYS))
    results = dataclasses.replace(Results.load(WEIGHTS / NAMES[0] / 'results.json'), budgeted=(row,))
    profile = StageCosts((1., 2., 4.), (0.5, 10., 0.25))
    assert time_budgets(results, profile) == pytest.approx([0.5 * 1.5 + 0.5 * (7. + 0.5 + 0.25)])


def test_stored_results_side_by_side(tmp_path, capsys):
    assert main(['compare', *NAMES, '--output', str(tmp_path / 'out')]) == 0
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / 'out' / 'comparison.json').read_text())
    entries = [Entry(name, (Results.load(WEIGHTS / name / 'results.json'),)) for name in NAMES]
    assert written['networks'] == NAMES and written['test_images'] == 10_000
    assert written['at_equal_cost'] == comparison_rows(entries) and len(written['at_equal_cost']) == 9
    middle = written['at_equal_cost'][4]
    assert f'{middle[NAMES[0]]:.2f}' in printed and f'{middle[NAMES[1]]:.2f}' in printed
    with open(tmp_path / 'out' / 'comparison.csv', newline='') as file:
        assert [row[NAMES[0]] and float(row[NAMES[0]]) for row in csv.DictReader(file)] == [
            row[NAMES[0]] or '' for row in written['at_equal_cost']]
    assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == [
        'anytime.png', 'budgeted.png', 'comparison.csv', 'comparison.json']
    for kind in ('anytime', 'budgeted'):
        (ax,) = comparison_figure(entries, kind).axes
        lines = {line.get_label(): line.get_xydata() for line in ax.lines}
        published = [c for c in PUBLISHED['torch/cifar100'] if c.mode == kind]
        assert list(lines) == [f'published: {c.work}' for c in published] + NAMES
        assert lines[f'published: {published[0].work}'].tolist() == [list(p) for p in published[0].points]
        rows = entries[0].results.exits if kind == 'anytime' else entries[0].results.budgeted
        assert lines[NAMES[0]][:, 1].tolist() == [row.accuracy for row in rows]


def test_time_on_this_machine(tmp_path, capsys):
    assert main(['compare', 'msfuse_cifar.cifar10', 'msfuse_cifar_budgeted', '--time', '--engine', 'torch',
                 '--output', str(tmp_path)]) == 0
    assert 'same average milliseconds' in capsys.readouterr().out and (tmp_path / 'time.png').is_file()
    rows = json.loads((tmp_path / 'comparison.json').read_text())['at_equal_time']
    assert len(rows) == 9 and rows[0]['ms'] < rows[-1]['ms']
    assert all(85. < row['msfuse_cifar_budgeted'] < 95. for row in rows)


def save_logits(path, **changes):
    """Three exits of some network on 600 images, of which 200 are held out."""
    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=600)
    logits = rng.normal(size=(3, 600, 4)) + np.array([1., 1.5, 2.])[:, None, None] * np.eye(4)[labels]
    arrays = dict(logits=logits, labels=labels, held_out=np.arange(600) < 200, macs=np.array([1, 2, 4]) * 10**6)
    np.savez(path, **{**arrays, **changes})
    return {**arrays, **changes}


def test_logits_of_any_network(tmp_path, capsys):
    stored = save_logits(tmp_path / 'theirs.npz')
    save_logits(tmp_path / 'better.npz', logits=stored['logits'] + 0.5 * np.eye(4)[stored['labels']])
    results = results_of(tmp_path / 'theirs.npz')
    right = (stored['logits'].argmax(2) == stored['labels'])[:, 200:].mean(1)
    assert [e.accuracy for e in results.exits] == pytest.approx((100 * right).round(3).tolist())
    assert [e.macs for e in results.exits] == [10**6, 2 * 10**6, 4 * 10**6]
    assert (results.validation_images, results.test_images) == (200, 400)
    assert main(['compare', str(tmp_path / 'better.npz'), str(tmp_path / 'theirs.npz'), '--output', str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert '400 test images\n' in printed and 'better against theirs' in printed and 'fewer' in printed
    assert main(['evaluate', str(tmp_path / 'theirs.npz'), '--guarantee', '--output', str(tmp_path / 'report')]) == 0
    printed = capsys.readouterr().out
    assert 'theirs: 400 test images, thresholds from 200' in printed and 'certified on 200 test images' in printed
    report = Results.load(tmp_path / 'report' / 'results.json')
    assert (report.model, report.exits, report.budgeted) == ('theirs', results.exits, results.budgeted)
    with open(tmp_path / 'report' / 'classes.csv', newline='') as file:
        assert sum(int(row['images']) for row in csv.DictReader(file)) == 400
    assert main(['evaluate', str(tmp_path / 'theirs.npz'), '--data-dir', str(tmp_path)]) == 2
    assert 'leave out --data-dir' in capsys.readouterr().err


@pytest.mark.parametrize('changes, words', [
    (dict(macs=np.array([4, 2, 1]) * 10**6), 'rising'), (dict(macs=np.array([1, 2]) * 10**6), 'of 3 exits'),
    (dict(macs=np.array([1., 2., 4.])), 'not in millions'), (dict(macs=np.array([1e6, 2e6, np.inf])), 'of 3 exits'),
    (dict(labels=np.arange(600)), 'labels from'), (dict(labels=np.zeros(600)), 'give whole numbers'),
    (dict(held_out=np.ones(600, bool)), 'leave some'), (dict(held_out=np.arange(600)), 'of type bool'),
    (dict(logits=np.zeros((3, 599, 4))), 'give \\(exits, images, classes\\)'),
    (dict(logits=np.full((3, 600, 4), np.nan)), 'NaN')])
def test_bad_logits_are_named(tmp_path, changes, words):
    save_logits(tmp_path / 'bad.npz', **changes)
    with pytest.raises(InputError, match=words):
        read_logits(tmp_path / 'bad.npz')


def test_what_cannot_be_compared(tmp_path, capsys):
    one = entry('one', (10, 60.), (20, 70.))
    for others, words in [((), 'two networks'), ((entry('one', (10, 60.)),), 'budgets number 2 and 1'), (
            (entry('one', (10, 60.), (20, 70.), exits=one.results.exits[:2]),), 'their exits cost'), (
            (entry('other', (10, 60.), dataset='torch/cifar10'),), 'compare on the same')]:
        with pytest.raises(InputError, match=words):
            check_comparable(joined_runs([one, *others]))
    (tmp_path / 'text.npz').write_text('no arrays')
    (tmp_path / 'empty.npz').touch()
    for names, words in [
            (['vgg8_mc_cifar', NAMES[0]], "no results are stored with 'vgg8_mc_cifar': pass --data-dir"),
            ([str(tmp_path / 'text.npz'), NAMES[0]], 'is not a .npz file with logits'),
            ([str(tmp_path / 'empty.npz'), NAMES[0]], 'is not a .npz file with logits'),
            ([str(tmp_path / 'none.npz'), NAMES[0]], 'is not a file'), (['msfus_cifar', NAMES[0]], 'did you mean'),
            ([str(tmp_path / 'text.npz'), NAMES[0], '--time'], 'leave out --time'),
            ([NAMES[0]], 'two networks'), ([NAMES[0], 'msfuse_cifar.cifar10'], 'compare on the same')]:
        assert main(['compare', *names, '--output', str(tmp_path / 'out')]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()
