"""Several networks side by side: accuracy at equal cost, and cost at equal accuracy, from their `Results`."""
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch

from ..errors import InputError
from ..files import write_csv, write_json, written_beside
from ..stopping.costs import ExitCosts, StageCosts
from ..stopping.policy import NEVER
from .evaluate import LabelledLogits, evaluate
from .results import Results, curve

LOGITS_HELP = 'logits (exits, images, classes), labels (images,), held_out (images,) and macs (exits,)'
DEVIATION = ' ±'  # after a network's name: standard deviation over its runs


@dataclass(frozen=True)
class Entry:
    """A network in a comparison.

    Attributes:
        name: For tables and legends.
        runs: What was measured; several where the network was trained more than once, from other seeds.
        milliseconds: Average time of an image under each budget of the only run on this machine; None if it was not
            measured.
    """

    name: str
    runs: Tuple[Results, ...]
    milliseconds: Optional[np.ndarray] = None

    @property
    def results(self) -> Results:
        """Those of the first run."""
        return self.runs[0]

    @property
    def label(self) -> str:
        return self.name if len(self.runs) == 1 else f'{self.name} ({len(self.runs)} runs)'

    def exits(self) -> np.ndarray:
        """MACs of each exit, and its mean, lowest and highest accuracy in percent, float64 (4, exits)."""
        accuracies = np.array([[e.accuracy for e in run.exits] for run in self.runs])
        return np.array([[e.macs for e in self.results.exits], accuracies.mean(0), accuracies.min(0),
                         accuracies.max(0)])

    def costs(self, time: bool = False) -> np.ndarray:
        """Average costs to draw, rising, where all runs have an accuracy: MACs, or milliseconds."""
        every = [self._curve(run, time)[0] for run in self.runs]
        grid = np.unique(np.concatenate(every))
        return grid[(grid >= max(x[0] for x in every)) & (grid <= min(x[-1] for x in every))]

    def accuracies_at(self, costs: Sequence[float], time: bool = False, best: bool = True) -> np.ndarray:
        """Accuracy in percent of each run at average costs, interpolated, (runs, costs); NaN below the cheapest.

        Args:
            costs: MACs or milliseconds.
            time: Whether they are milliseconds.
            best: Take the best at no more than that cost: what is better at a lower cost serves at a higher one too.
        """
        rows = []
        for run in self.runs:
            x, y = self._curve(run, time)
            rows.append(np.interp(costs, x, np.maximum.accumulate(y) if best else y, left=np.nan))
        return np.array(rows)

    def accuracy_at(self, cost: float, time: bool = False) -> float:
        """Mean over the runs of `accuracies_at`."""
        return float(self.accuracies_at([cost], time).mean())

    def cost_at(self, accuracy: float, time: bool = False) -> float:
        """The least average cost at which the mean of the runs reaches an accuracy; NaN if it never does."""
        x, y = self.front(time)
        if accuracy > y[-1]:
            return float('nan')
        k = int(np.argmax(y >= accuracy))
        return float(x[0] if k == 0 else np.interp(accuracy, y[k - 1:k + 1], x[k - 1:k + 1]))

    def front(self, time: bool = False) -> np.ndarray:
        """Costs, and the mean over the runs of the best accuracy at each, rising, (2, costs)."""
        x = self.costs(time)
        return np.array([x, self.accuracies_at(x, time).mean(0)])

    def drawn(self, time: bool = False) -> np.ndarray:
        """Costs, and the mean, lowest and highest accuracy of the runs at each, as measured, (4, costs)."""
        if len(self.runs) == 1:
            x, y = self._curve(self.results, time)
            return np.array([x, y, y, y])
        x = self.costs(time)
        accuracies = self.accuracies_at(x, time, best=False)
        return np.array([x, accuracies.mean(0), accuracies.min(0), accuracies.max(0)])

    def _curve(self, run: Results, time: bool) -> np.ndarray:
        x, y = curve(run.budgeted)
        if time and self.milliseconds is not None:
            x = self.milliseconds
        order = np.argsort(x, kind='stable')
        return np.array([x[order], y[order]])


def joined_runs(entries: Sequence[Entry]) -> List[Entry]:
    """Entries of one name as runs of one network.

    Raises:
        InputError: their exits cost other MACs, their average costs do not overlap, or a run is given twice.
    """
    by_name: Dict[str, List[Entry]] = {}
    for entry in entries:
        by_name.setdefault(entry.name, []).append(entry)
    joined = []
    for name, same in by_name.items():
        runs = tuple(run for entry in same for run in entry.runs)
        if any(run in runs[:i] for i, run in enumerate(runs)):
            raise InputError(f"'{name}' is given twice, with the same results")
        costs = [[e.macs for e in run.exits] for run in runs]
        if any(c != costs[0] for c in costs):
            raise InputError(f"two networks are called '{name}', and their exits cost {costs[0]} and "
                             f"{next(c for c in costs if c != costs[0])} MACs: rename a file")
        joined.append(same[0] if len(same) == 1 else Entry(name, runs))
        if not len(joined[-1].costs()):
            raise InputError(f"the runs of '{name}' share no average cost: compare them one by one")
    return joined


def check_comparable(entries: Sequence[Entry]) -> None:
    """Checks that networks were measured on the same images.

    Raises:
        InputError: fewer than two, or other images.
    """
    if len(entries) < 2:
        raise InputError('nothing to compare: give two networks or more')
    first = entries[0]
    for entry in entries:
        for run in entry.runs:
            ours, theirs = ((r.dataset, r.test_images) for r in (first.results, run))
            if ours != theirs:
                raise InputError(
                    f"'{first.name}' was measured on {ours[1]:,} images of {ours[0] or 'unknown origin'}, "
                    f"'{entry.name}' on {theirs[1]:,} of {theirs[0] or 'unknown origin'}: compare on the same")


def time_budgets(results: Results, profile: StageCosts) -> np.ndarray:
    """Average milliseconds of an image under each budget of `results`, from the times of stages and heads."""
    times = []
    for row in results.budgeted:
        used = [k for k, threshold in enumerate(row.thresholds) if threshold < NEVER]
        times.append(float(np.dot(np.asarray(row.exit_shares)[used], profile.of_exits(used))))
    return np.array(times)


def read_logits(path: Path, measure: str = 'max_softmax') -> Results:
    """Evaluates a network of any kind from the logits of its exits.

    Args:
        path: A .npz file with the arrays of `LOGITS_HELP`: `macs` is the cumulative cost of each exit, and thresholds
            are set on the images for which `held_out` is true.
        measure: See `evaluate.evaluate`.

    Raises:
        InputError: not such a file, or arrays that cannot be used.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in ('logits', 'labels', 'held_out', 'macs')}
        held_out, labels = arrays['held_out'].astype(bool), torch.from_numpy(arrays['labels'].astype(np.int64))
        logits = torch.from_numpy(arrays['logits'].astype(np.float32))
        macs = tuple(int(m) for m in arrays['macs'])
        parts = [LabelledLogits(logits[:, rows], labels[rows]) for rows in (held_out, ~held_out)]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise InputError(f"'{path}' is not a .npz file with {LOGITS_HELP} ({error})") from None
    if len(macs) != len(logits) or list(macs) != sorted(set(macs)) or macs[0] < 1:
        raise InputError(f"macs {macs} in '{path}': give the cumulative multiply-adds of {len(logits)} exits, rising")
    if not 0 < held_out.sum() < len(held_out):
        raise InputError(f"held_out in '{path}' is true for {held_out.sum()} of {len(held_out)} images: mark some to "
                         'set thresholds on, and leave some to measure on')
    costs = ExitCosts(macs, (1,) * len(macs), (1, 1, 1))  # parameters and image size are unknown and not compared
    return evaluate(*parts, costs, measure=measure)[0]


def comparison_rows(entries: Sequence[Entry], time: bool = False) -> List[dict]:
    """One row per cost of a grid that all networks share: accuracy of each, and its deviation over several runs."""
    low = max(entry.costs(time)[0] for entry in entries)
    high = min(entry.costs(time)[-1] for entry in entries)
    if low >= high:
        return []
    unit = 'ms' if time else 'macs'
    rows = []
    for cost in np.linspace(low, high, 9):
        row = {unit: float(cost)}
        for entry in entries:
            accuracies = entry.accuracies_at([cost], time)
            row[entry.name] = round(float(accuracies.mean()), 3)
            if len(entry.runs) > 1:
                row[entry.name + DEVIATION] = round(float(accuracies.std(ddof=1)), 3)
        rows.append(row)
    return rows


def saved(entry: Entry, other: Entry, time: bool = False) -> List[dict]:
    """What both cost for the same accuracy, at each half percent that both reach."""
    (_, ours), (_, theirs) = entry.front(time), other.front(time)
    low, high = max(ours[0], theirs[0]), min(ours[-1], theirs[-1])
    rows = []
    for accuracy in np.arange(np.ceil(2 * low) / 2, high + 1e-9, 0.5):
        own, its = entry.cost_at(accuracy, time), other.cost_at(accuracy, time)
        rows.append(dict(accuracy=float(accuracy), other=other.name, own=own, its=its, share=own / its))
    return rows


def write_comparison(entries: Sequence[Entry], folder: Path) -> List[Path]:
    """Writes comparison.json, comparison.csv and the figures anytime.png, budgeted.png and, with times, time.png.

    Raises:
        InputError: the folder cannot be written to.
    """
    from .figures import comparison_figure
    timed = all(entry.milliseconds is not None for entry in entries)
    rows = comparison_rows(entries)
    savings = [row for other in entries[1:] for row in saved(entries[0], other)]
    write_json(folder / 'comparison.json', dict(
        networks=[e.name for e in entries], runs=[len(e.runs) for e in entries], dataset=entries[0].results.dataset,
        test_images=entries[0].results.test_images, at_equal_cost=rows, at_equal_accuracy=savings,
        at_equal_time=comparison_rows(entries, True) if timed else []))
    paths = [folder / 'comparison.json']
    if rows:
        write_csv(folder / 'comparison.csv', rows)
        paths.append(folder / 'comparison.csv')
    for kind in ('anytime', 'budgeted', *(['time'] if timed else [])):
        path = folder / f'{kind}.png'
        with written_beside(path) as partial:
            comparison_figure(entries, kind).savefig(partial, dpi=150)
        paths.append(path)
    return paths
