"""compare: equal cost and equal accuracy from results, stored or made from logits, and what cannot be compared."""
import csv
import dataclasses
import json

import numpy as np
import pytest
from conftest import PROJECT

from timm_multiexit.cli import main
from timm_multiexit.errors import InputError
from timm_multiexit.evaluation.compare import Entry, check_comparable, comparison_rows, read_logits, saved, time_budgets
from timm_multiexit.evaluation.figures import comparison_figure
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
    return Entry(name, dataclasses.replace(stored, budgeted=rows, **changes))


def test_equal_cost_and_equal_accuracy():
    one, other = entry('one', (10, 60.), (20, 70.), (30, 69.), (40, 72.)), entry('other', (20, 60.), (40, 70.))
    assert one.accuracy_at(15e6) == 65. and one.accuracy_at(30e6) == 70.  # what is worse at a higher cost is not used
    assert np.isnan(one.accuracy_at(9e6)) and one.accuracy_at(50e6) == 72.
    assert one.cost_at(65.) == 15e6 and one.cost_at(60.) == 10e6 and np.isnan(one.cost_at(73.))
    assert one.cost_at(71.) == pytest.approx(35e6)
    rows = comparison_rows([one, other])
    assert [rows[0]['macs'], rows[-1]['macs']] == [20e6, 40e6]
    assert rows[4] == {'macs': 30e6, 'one': 70., 'other': 65.}
    halves = {row['accuracy']: row for row in saved(one, other)}
    assert list(halves) == [60. + i / 2 for i in range(21)]
    assert (halves[65.]['own'], halves[65.]['its'], halves[65.]['share']) == (15e6, 30e6, 0.5)
    apart = entry('apart', (50, 80.), (60, 90.))
    assert comparison_rows([one, apart]) == [] and saved(one, apart) == []


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
    entries = [Entry(name, Results.load(WEIGHTS / name / 'results.json')) for name in NAMES]
    assert written['networks'] == NAMES and written['test_images'] == 10_000
    assert written['at_equal_cost'] == comparison_rows(entries) and len(written['at_equal_cost']) == 9
    middle = written['at_equal_cost'][4]
    assert f'{middle[NAMES[0]]:.2f}' in printed and f'{middle[NAMES[1]]:.2f}' in printed
    with open(tmp_path / 'out' / 'comparison.csv', newline='') as file:
        assert [float(row[NAMES[0]]) for row in csv.DictReader(file)] == [
            row[NAMES[0]] for row in written['at_equal_cost']]
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
    results = read_logits(tmp_path / 'theirs.npz')
    right = (stored['logits'].argmax(2) == stored['labels'])[:, 200:].mean(1)
    assert [e.accuracy for e in results.exits] == pytest.approx((100 * right).round(3).tolist())
    assert [e.macs for e in results.exits] == [10**6, 2 * 10**6, 4 * 10**6]
    assert (results.validation_images, results.test_images) == (200, 400)
    assert main(['compare', str(tmp_path / 'better.npz'), str(tmp_path / 'theirs.npz'), '--output', str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert '400 test images\n' in printed and 'better against theirs' in printed and 'fewer' in printed


@pytest.mark.parametrize('changes, words', [
    (dict(macs=np.array([4, 2, 1])), 'rising'), (dict(macs=np.array([1, 2])), 'of 3 exits'),
    (dict(labels=np.arange(600)), 'labels from'), (dict(held_out=np.ones(600, bool)), 'leave some'),
    (dict(logits=np.zeros((3, 599, 4))), 'is not a .npz file with'),
    (dict(logits=np.full((3, 600, 4), np.nan)), 'NaN')])
def test_bad_logits_are_named(tmp_path, changes, words):
    save_logits(tmp_path / 'bad.npz', **changes)
    with pytest.raises(InputError, match=words):
        read_logits(tmp_path / 'bad.npz')


def test_what_cannot_be_compared(tmp_path, capsys):
    one = entry('one', (10, 60.), (20, 70.))
    for others, words in [((), 'two networks'), ((one,), 'given twice'), (
            (entry('other', (10, 60.), dataset='torch/cifar10'),), 'compare on the same')]:
        with pytest.raises(InputError, match=words):
            check_comparable([one, *others])
    (tmp_path / 'text.npz').write_text('no arrays')
    for names, words in [
            (['msdnet_cifar', NAMES[0]], "no results are stored with 'msdnet_cifar': pass --data-dir"),
            ([str(tmp_path / 'text.npz'), NAMES[0]], 'is not a .npz file with logits'),
            ([str(tmp_path / 'text.npz'), NAMES[0], '--time'], 'leave out --time'),
            ([NAMES[0]], 'two networks'), ([NAMES[0], 'msfuse_cifar.cifar10'], 'compare on the same')]:
        assert main(['compare', *names, '--output', str(tmp_path / 'out')]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()
