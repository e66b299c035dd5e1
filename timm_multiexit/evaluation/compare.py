"""Several networks side by side: accuracy at equal cost, and cost at equal accuracy, from their `Results`."""
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Sequence, Tuple

import numpy as np

from ..errors import InputError
from ..files import write_csv, write_json, written_beside
from ..stopping.costs import StageCosts
from ..stopping.policy import NEVER
from .results import Results, curve

COMPARISON_NAME = 'comparison.json'
UNITS = ('macs', 'ms')
DEVIATION = ' ±'  # after a network's name: standard deviation over its runs


@dataclass(frozen=True)
class Entry:
    """A network in a comparison, under one stopping rule.

    Attributes:
        network: Its name.
        runs: What was measured; several where the network was trained more than once, say from other seeds.
        milliseconds: Average time of an image on this machine under each budget, of each run; empty if it was not
            measured.
        rule: Named where entries differ in it.
    """

    network: str
    runs: Tuple[Results, ...]
    milliseconds: Tuple[np.ndarray, ...] = ()
    rule: str = ''

    @property
    def results(self) -> Results:
        """Of the first run; networks, costs and images are those of all."""
        return self.runs[0]

    @property
    def name(self) -> str:
        return f'{self.network}, {self.rule}' if self.rule else self.network

    def exits(self) -> np.ndarray:
        """MACs of each exit, and its mean, lowest and highest accuracy in percent over the runs, (4, exits)."""
        return _over_runs([[[e.macs for e in run.exits], [e.accuracy for e in run.exits]] for run in self.runs])

    def curve(self, time: bool = False) -> np.ndarray:
        """Average cost under each budget, in MACs or milliseconds, and accuracies as in `exits`, (4, budgets)."""
        return _over_runs(self._curves(time))

    def accuracies_at(self, cost: float, time: bool = False) -> np.ndarray:
        """The best accuracy in percent of each run at an average cost of at most `cost`, interpolated, (runs,).

        What is better at a lower cost serves at a higher one too. NaN below the cheapest.
        """
        return np.array([np.interp(cost, *_best(points), left=np.nan) for points in self._curves(time)])

    def cost_at(self, accuracy: float) -> float:
        """The fewest average MACs at which the mean of the runs reaches an accuracy; NaN if it never does."""
        x, y = self.front()
        reached = y >= accuracy - 1e-9  # a mean of runs is rounded
        if not reached.any():
            return float('nan')
        k = int(np.argmax(reached))
        return float(x[0] if k == 0 else np.interp(accuracy, y[k - 1:k + 1], x[k - 1:k + 1]))

    def front(self, time: bool = False) -> np.ndarray:
        """Average costs, and the best accuracy at no more than each, both rising, (2, budgets)."""
        return _best(self.curve(time)[:2])

    def _curves(self, time: bool) -> List[np.ndarray]:
        curves = [curve(run.budgeted) for run in self.runs]
        return [np.array([ms, y]) for ms, (_, y) in zip(self.milliseconds, curves)] if time else curves


def _over_runs(curves: Sequence) -> np.ndarray:
    """Mean cost, and mean, lowest and highest accuracy, of curves (2, points) of several runs."""
    costs, accuracies = np.array(curves, np.float64).swapaxes(0, 1)
    return np.array([costs.mean(0), accuracies.mean(0), accuracies.min(0), accuracies.max(0)])


def _best(points: np.ndarray) -> np.ndarray:
    x, y = points[:, np.argsort(points[0], kind='stable')]
    return np.array([x, np.maximum.accumulate(y)])


def joined_runs(entries: Sequence[Entry]) -> List[Entry]:
    """Entries of one network and rule as its runs; the rule is named if they differ in it.

    Raises:
        InputError: runs whose exits or budgets differ, or a name that the tables need.
    """
    several = len({entry.results.measure for entry in entries}) > 1
    groups: Dict[Tuple[str, str], List[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.network, entry.results.measure if several else ''), []).append(entry)
    joined = []
    for (network, rule), same in groups.items():
        if network in UNITS or network.endswith(DEVIATION):
            raise InputError(f"a network cannot be called '{network}' in a table: name it, NAME=FILE")
        runs = tuple(run for entry in same for run in entry.runs)
        for what, values in (('exits cost', [[e.macs for e in run.exits] for run in runs]),
                             ('budgets number', [len(run.budgeted) for run in runs])):
            for value in values:
                if value != values[0]:
                    raise InputError(f"the runs of '{network}' are of different networks, their {what} {values[0]} and "
                                     f'{value}: give them other names, NAME=FILE')
        joined.append(Entry(network, runs, tuple(ms for entry in same for ms in entry.milliseconds), rule))
    return joined


def check_comparable(entries: Sequence[Entry]) -> None:
    """Checks that there is something to compare, measured on the same images.

    Raises:
        InputError: a single run, or other images.
    """
    runs = [(entry.name, run) for entry in entries for run in entry.runs]
    if len(runs) < 2:
        raise InputError('nothing to compare: give two networks or more')
    (first, results), *others = runs
    for name, run in others:
        ours, theirs = ((r.dataset, r.test_images) for r in (results, run))
        if ours != theirs:
            hint = '' if ours[0] and theirs[0] else ", and name it in the .npz file, as 'dataset'"
            raise InputError(f"'{first}' was measured on {ours[1]:,} images of {ours[0] or 'unknown origin'}, '{name}' "
                             f"on {theirs[1]:,} of {theirs[0] or 'unknown origin'}: compare on the same{hint}")


def time_budgets(results: Results, profile: StageCosts) -> np.ndarray:
    """Average milliseconds of an image under each budget of `results`, from the times of stages and heads."""
    times = []
    for row in results.budgeted:
        used = [k for k, threshold in enumerate(row.thresholds) if threshold < NEVER]
        times.append(float(np.dot(np.asarray(row.exit_shares)[used], profile.of_exits(used))))
    return np.array(times)


def comparison_rows(entries: Sequence[Entry], time: bool = False) -> List[dict]:
    """One row per cost, from the cheapest of all to the most expensive: accuracy of each network, mean and deviation.

    None where a network has no answer as cheap. At more than its full cost it has the accuracy of that.
    """
    ends = [entry.front(time)[0][[0, -1]] for entry in entries]
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    rows = []
    for cost in np.linspace(low, high, 9 if high > low else 1):
        row = {UNITS[time]: float(cost)}
        for entry in entries:
            accuracies = entry.accuracies_at(cost, time)
            known = not np.isnan(accuracies).any()
            row[entry.name] = round(float(accuracies.mean()), 3) if known else None
            if len(entry.runs) > 1:
                row[entry.name + DEVIATION] = round(float(accuracies.std(ddof=1)), 3) if known else None
        rows.append(row)
    return rows


def saved(entry: Entry, other: Entry) -> List[dict]:
    """The average MACs of both for the same accuracy, at each half percent that both reach."""
    (_, ours), (_, theirs) = entry.front(), other.front()
    low, high = max(ours[0], theirs[0]), min(ours[-1], theirs[-1])
    rows = []
    for accuracy in np.arange(np.ceil(2 * low) / 2, high + 1e-9, 0.5):
        own, its = entry.cost_at(accuracy), other.cost_at(accuracy)
        rows.append(dict(accuracy=float(accuracy), other=other.name, own=own, its=its, share=own / its))
    return rows


def write_comparison(entries: Sequence[Entry], folder: Path) -> List[Path]:
    """Writes comparison.json, comparison.csv and the figures anytime.png, budgeted.png and, with times, time.png.

    Raises:
        InputError: the folder cannot be written to.
    """
    from .figures import comparison_figure
    timed = all(entry.milliseconds for entry in entries)
    rows = comparison_rows(entries)
    savings = [row for other in entries[1:] for row in saved(entries[0], other)]
    write_json(folder / COMPARISON_NAME, dict(
        networks=[e.name for e in entries], runs=[len(e.runs) for e in entries], dataset=entries[0].results.dataset,
        test_images=entries[0].results.test_images, at_equal_cost=rows, at_equal_accuracy=savings,
        at_equal_time=comparison_rows(entries, True) if timed else []))
    write_csv(folder / 'comparison.csv', rows)
    paths = [folder / COMPARISON_NAME, folder / 'comparison.csv']
    for kind in ('anytime', 'budgeted', *(['time'] if timed else [])):
        path = folder / f'{kind}.png'
        with written_beside(path) as partial:
            comparison_figure(entries, kind).savefig(partial, dpi=150)
        paths.append(path)
    return paths
