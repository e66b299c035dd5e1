"""Several networks side by side: accuracy at equal cost, and cost at equal accuracy, from their `Results`."""
from dataclasses import dataclass
from pathlib import Path
from typing import List, Optional, Sequence

import numpy as np
import torch

from ..errors import InputError
from ..files import write_csv, write_json, written_beside
from ..stopping.costs import ExitCosts, StageCosts
from ..stopping.policy import NEVER
from .evaluate import LabelledLogits, evaluate
from .results import Results, curve

LOGITS_HELP = 'logits (exits, images, classes), labels (images,), held_out (images,) and macs (exits,)'


@dataclass(frozen=True)
class Entry:
    """A network in a comparison.

    Attributes:
        name: For tables and legends.
        results: What was measured.
        milliseconds: Average time of an image under each budget of `results.budgeted` on this machine; None if it was
            not measured.
    """

    name: str
    results: Results
    milliseconds: Optional[np.ndarray] = None

    def costs(self, time: bool = False) -> np.ndarray:
        """Average cost under each budget: MACs, or milliseconds."""
        macs = curve(self.results.budgeted)[0]
        return macs if not time or self.milliseconds is None else self.milliseconds

    def accuracy_at(self, cost: float, time: bool = False) -> float:
        """The best accuracy in percent at an average cost of at most `cost`, interpolated; NaN below the cheapest."""
        x, y = self.front(time)
        return float(np.interp(cost, x, y, left=np.nan))

    def cost_at(self, accuracy: float, time: bool = False) -> float:
        """The least average cost that reaches an accuracy, interpolated; NaN if none does."""
        x, y = self.front(time)
        if accuracy > y[-1]:
            return float('nan')
        k = int(np.argmax(y >= accuracy))
        return float(x[0] if k == 0 else np.interp(accuracy, y[k - 1:k + 1], x[k - 1:k + 1]))

    def front(self, time: bool) -> np.ndarray:
        """Costs and accuracies (2, budgets), rising: what is better at a lower cost serves at a higher one too."""
        x, y = self.costs(time), curve(self.results.budgeted)[1]
        order = np.argsort(x)
        return np.array([x[order], np.maximum.accumulate(y[order])])


def check_comparable(entries: Sequence[Entry]) -> None:
    """Checks that networks were measured on the same images.

    Raises:
        InputError: fewer than two, a name twice, or other images.
    """
    if len(entries) < 2:
        raise InputError('nothing to compare: give two networks or more')
    first = entries[0]
    for i, entry in enumerate(entries):
        if entry.name in [e.name for e in entries[:i]]:
            raise InputError(f"'{entry.name}' is given twice")
        ours, theirs = ((e.results.dataset, e.results.test_images) for e in (first, entry))
        if ours != theirs:
            raise InputError(f"'{first.name}' was measured on {ours[1]:,} images of {ours[0] or 'unknown origin'}, "
                             f"'{entry.name}' on {theirs[1]:,} of {theirs[0] or 'unknown origin'}: compare on the same")


def time_budgets(results: Results, profile: StageCosts) -> np.ndarray:
    """Average milliseconds of an image under each budget of `results`, from the times of stages and heads."""
    times = []
    for row in results.budgeted:
        used = [k for k, threshold in enumerate(row.thresholds) if threshold < NEVER]
        times.append(float(np.dot(np.asarray(row.exit_shares)[used], profile.of_exits(used))))
    return np.array(times)


def read_logits(path: Path) -> Results:
    """Evaluates a network of any kind from the logits of its exits.

    Args:
        path: A .npz file with the arrays of `LOGITS_HELP`: `macs` is the cumulative cost of each exit, and thresholds
            are set on the images for which `held_out` is true.

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
    return evaluate(*parts, costs)[0]


def comparison_rows(entries: Sequence[Entry], time: bool = False) -> List[dict]:
    """One row per cost of a grid that all networks share: accuracy of each."""
    low = max(entry.costs(time).min() for entry in entries)
    high = min(entry.costs(time).max() for entry in entries)
    if low >= high:
        return []
    unit = 'ms' if time else 'macs'
    return [{unit: float(cost), **{e.name: round(e.accuracy_at(cost, time), 3) for e in entries}}
            for cost in np.linspace(low, high, 9)]


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
        networks=[e.name for e in entries], dataset=entries[0].results.dataset,
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
