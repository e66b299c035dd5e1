"""Measures a network on test images: each exit alone, and average budgets kept by thresholds from validation images.

No choice looks at a test label: temperatures and thresholds come from the validation logits alone.
"""
import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from timm.data import resolve_data_config
from tqdm import tqdm

from ..datasets import normalize
from ..errors import InputError
from ..files import write_json, written_beside
from ..models import MultiExitNet
from ..stopping.costs import ExitCosts
from ..stopping.scores import check_labelled_logits, interpolate
from ..stopping.simulate import simulate
from ..stopping.solve import solve_policies
from ..stopping.temperature import fit_temperature

CALIBRATION_BINS = 15


@torch.inference_mode()
def exit_logits(
        model: MultiExitNet,
        images: torch.Tensor,
        targets: torch.Tensor,
        batch_size: int = 256,
        device: str = 'cpu',
        label: str = '',
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Logits of every exit, under the test transform.

    Args:
        model: A network in eval mode, on `device`.
        images: uint8 (N, C, H, W).
        targets: int64 (N,).
        batch_size: Images a batch.
        device: Where to run.
        label: Of the progress bar, which appears on terminals only.

    Returns:
        Logits float32 (num_exits, N, num_classes) and the targets, on the CPU.

    Raises:
        InputError: no images, or labels or logits that cannot be used.
    """
    if len(images) == 0:
        raise InputError('there are no images to run: check --data-dir and --validation-images')
    config = resolve_data_config(model=model)
    batches = []
    with tqdm(total=len(images), desc=label, unit='image', disable=None) as progress:
        for part in images.split(batch_size):
            x = normalize(part.to(device), config['mean'], config['std'])
            batches.append(torch.stack(model.forward_exits(x)).float().cpu())
            progress.update(len(x))
    logits = torch.cat(batches, 1)
    check_labelled_logits(logits, targets)
    return logits, targets


@dataclass(frozen=True)
class LabelledLogits:
    """Logits float32 (num_exits, N, num_classes) of a split, and its targets int64 (N,)."""

    logits: torch.Tensor
    targets: torch.Tensor

    def accuracies(self) -> List[float]:
        """Top-1 accuracy of each exit in percent."""
        return (100. * (self.logits.argmax(2) == self.targets).double().mean(1)).tolist()


def calibration_error(logits: torch.Tensor, targets: torch.Tensor, temperature: float = 1.) -> float:
    """Expected calibration error of one exit in percent, over 15 bins of equal width; logits (N, num_classes)."""
    from torchmetrics.functional.classification import multiclass_calibration_error
    error = multiclass_calibration_error(
        (logits / temperature).softmax(1), targets, num_classes=logits.shape[1], n_bins=CALIBRATION_BINS, norm='l1')
    return 100. * float(error)


def oracle(test: LabelledLogits, exit_macs: Sequence[int]) -> List[Dict[str, float]]:
    """What an oracle would reach that stops at the first exit that is right.

    Returns:
        For each exit k, with no more than k exits: average MACs and accuracy in percent. An image that none of them
        gets right runs up to exit k.
    """
    right = test.logits.argmax(2) == test.targets
    costs = torch.tensor(list(exit_macs), dtype=torch.float64)
    points = []
    for k in range(len(right)):
        stops = right[:k + 1].clone()
        accuracy = 100. * float(stops.any(0).double().mean())
        stops[k] = True
        average = float(costs[stops.int().argmax(0)].mean())
        points.append(dict(exits=k + 1, average_macs=round(average), accuracy=round(accuracy, 3)))
    return points


def evaluate(
        validation: LabelledLogits,
        test: LabelledLogits,
        costs: ExitCosts,
        budgets: Optional[Sequence[float]] = None,
        measure: str = 'max_softmax',
) -> Dict[str, Any]:
    """All that a report holds, as plain values; accuracies and calibration errors in percent.

    Args:
        validation: On these, temperatures and thresholds are set.
        test: On these, everything is measured; the average cost is that of the exits really taken.
        costs: Of the exits.
        budgets: Average MACs per image; None for `solve.budget_grid`, with the rows that `solve_policies` adds to it.
        measure: Confidence measure, see `policy.confidence`.

    Raises:
        InputError: logits, labels or budgets that cannot be used, or a confidence measure that does not exist.
    """
    temperatures = [round(fit_temperature(x, validation.targets), 4) for x in validation.logits]
    exits = []
    for k, (accuracy, held_out) in enumerate(zip(test.accuracies(), validation.accuracies())):
        exits.append(dict(
            exit=k + 1, macs=costs.macs[k], params=costs.params[k], accuracy=round(accuracy, 3),
            validation_accuracy=round(held_out, 3), temperature=temperatures[k],
            calibration_error=round(calibration_error(test.logits[k], test.targets), 3),
            calibration_error_with_temperature=round(
                calibration_error(test.logits[k], test.targets, temperatures[k]), 3)))
    budgeted = {}
    families = solve_policies(
        validation.logits, validation.targets, costs.macs, budgets=budgets, measure=measure, temperatures=temperatures)
    for method, policies in families.items():
        rows = []
        for policy in policies:
            result = simulate(policy, test.logits, costs.macs)
            rows.append(dict(
                budget=policy.budget, average_macs=round(result.average_macs),
                accuracy=round(result.accuracy(test.targets), 3),
                over_budget=round(100. * (result.average_macs / policy.budget - 1.), 3),
                validation_macs=policy.expected_macs, validation_accuracy=policy.expected_accuracy,
                exit_shares=[round(s, 5) for s in result.exit_shares(len(exits))],
                thresholds=list(policy.thresholds)))
        budgeted[method] = rows
    return dict(
        validation_images=len(validation.targets), test_images=len(test.targets), measure=measure,
        input_size=list(costs.input_size), exits=exits, budgeted=budgeted, oracle=oracle(test, costs.macs),
        comparison=compare(budgeted))


def compare(budgeted: Dict[str, List[Dict[str, Any]]]) -> Dict[str, Any]:
    """Curves at the same average cost on test, in points of accuracy: search against the rule, fast against search."""
    curves = {}
    for method, rows in budgeted.items():
        curves[method] = [np.array([r[key] for r in rows]) for key in ('average_macs', 'accuracy')]
    macs, accuracy = curves['search']
    gain = accuracy - interpolate(*curves['geometric'], macs)
    fast = curves['fast'][1] - interpolate(*curves['search'], curves['fast'][0])
    return dict(
        mean_gain=round(float(gain.mean()), 4), smallest_gain=round(float(gain.min()), 4),
        gains=[round(g, 4) for g in gain.tolist()],
        mean_gain_fast=round(float(fast.mean()), 4), smallest_gain_fast=round(float(fast.min()), 4),
        largest_budget_error=max(abs(r['over_budget']) for rows in budgeted.values() for r in rows))


def write_report(results: Dict[str, Any], folder: Path) -> List[Path]:
    """Writes results.json, exits.csv, budgeted.csv, anytime.png and budgeted.png; returns their paths.

    Each file is written beside and renamed.

    Raises:
        InputError: the folder cannot be written to.
    """
    from .figures import anytime_figure, budgeted_figure
    folder = Path(folder)
    write_json(folder / 'results.json', results)
    _write_csv(folder / 'exits.csv', results['exits'])
    rows = []
    for method, points in results['budgeted'].items():
        for point in points:
            row = dict(method=method, **point)
            for name in ('exit_shares', 'thresholds'):
                for k, value in enumerate(row.pop(name), 1):
                    row[f'{name[:-1]}_{k}'] = value
            rows.append(row)
    _write_csv(folder / 'budgeted.csv', rows)
    for name, draw in (('anytime.png', anytime_figure), ('budgeted.png', budgeted_figure)):
        with written_beside(folder / name) as partial:
            draw(results).savefig(partial, dpi=150)
    return [folder / n for n in ('results.json', 'exits.csv', 'budgeted.csv', 'anytime.png', 'budgeted.png')]


def _write_csv(path: Path, rows: List[Dict[str, Any]]) -> None:
    with written_beside(path) as partial, partial.open('w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
