"""Measures a network on test images: each exit alone, and average budgets under thresholds from validation images.

Nothing is chosen on the test images: temperatures and thresholds come from the validation logits alone.
"""
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Iterable, Iterator, List, Optional, Sequence, Tuple

import torch
from timm.data import resolve_data_config

from ..datasets import normalize
from ..errors import InputError
from ..files import write_csv, written_beside
from ..models import MultiExitNet
from ..stopping.agreement import Agreement
from ..stopping.config import ExitConfig
from ..stopping.costs import ExitCosts
from ..stopping.policy import MEASURES, StoppingRule
from ..stopping.scores import check_labelled_logits
from ..stopping.simulate import simulate
from .results import RESULTS_NAME, BudgetResult, ExitResult, OracleResult, Results

CALIBRATION_BINS = 15
AGREEMENT = 'agreement'
RULES = (*MEASURES, AGREEMENT)


@dataclass(frozen=True)
class LabelledLogits:
    """Logits float32 (num_exits, N, num_classes) of a split, and its targets int64 (N,)."""

    logits: torch.Tensor
    targets: torch.Tensor

    def accuracies(self) -> List[float]:
        """Top-1 accuracy of each exit in percent."""
        return (100. * (self.logits.argmax(2) == self.targets).double().mean(1)).tolist()


@torch.inference_mode()
def exit_logits(
        model: MultiExitNet,
        images: Iterable[Tuple[torch.Tensor, torch.Tensor]],
        device: str = 'cpu',
        unknown: bool = False,
) -> LabelledLogits:
    """Logits of every exit, on the CPU, under the test transform.

    Args:
        model: A network in eval mode, on `device`.
        images: Batches uint8 (B, C, H, W) with targets int64 (B,), like `data.images.Images`.
        device: Where to run.
        unknown: Whether a label may be unknown, -1.

    Raises:
        InputError: no images, or labels or logits that cannot be used.
    """
    config = resolve_data_config(model=model)
    batches, labels = [], []
    for part, target in images:
        x = normalize(part.to(device), config['mean'], config['std'])
        batches.append(torch.stack(model.forward_exits(x)).float().cpu())
        labels.append(target)
    if not batches:
        raise InputError('there are no images to run: check --data-dir and --validation-images')
    logits, targets = torch.cat(batches, 1), torch.cat(labels)
    check_labelled_logits(logits, targets, unknown)
    return LabelledLogits(logits, targets)


def calibration_error(logits: torch.Tensor, targets: torch.Tensor, temperature: float = 1.) -> float:
    """Expected calibration error of one exit in percent, over 15 bins of equal width; logits (N, num_classes)."""
    from torchmetrics.functional.classification import multiclass_calibration_error
    error = multiclass_calibration_error(
        (logits / temperature).softmax(1), targets, num_classes=logits.shape[1], n_bins=CALIBRATION_BINS, norm='l1')
    return 100. * float(error)


def oracle(test: LabelledLogits, exit_macs: Sequence[int]) -> Tuple[OracleResult, ...]:
    """What an oracle would reach that stops at the first correct exit.

    Returns:
        For each exit k, with the first k exits. An image that none of them classifies correctly runs up to exit k.
    """
    correct = test.logits.argmax(2) == test.targets
    costs = torch.tensor(list(exit_macs), dtype=torch.float64)
    points = []
    for k in range(len(correct)):
        stops = correct[:k + 1].clone()
        accuracy = 100. * float(stops.any(0).double().mean())
        stops[k] = True
        average = float(costs[stops.int().argmax(0)].mean())
        points.append(OracleResult(k + 1, round(average), round(accuracy, 3)))
    return tuple(points)


def evaluate(
        validation: LabelledLogits,
        test: LabelledLogits,
        costs: ExitCosts,
        measure: str = 'max_softmax',
) -> Tuple[Results, ExitConfig]:
    """Everything that a report holds.

    Args:
        validation: Temperatures and thresholds are set on these.
        test: Everything is measured on these; the average cost is that of the exits really taken.
        costs: Costs of the exits.
        measure: Confidence measure, see `policy.scores`; or 'agreement', which has one budget for each patience, what
            it costs on the validation images, see `agreement`.

    Returns:
        The results, without the names of model, data set and checkpoint, which the caller knows, and the exit config of
        the validation images, which solved the policies.

    Raises:
        InputError: logits or labels that cannot be used, or an unknown confidence measure.
    """
    config = ExitConfig.fit(validation.logits, validation.targets, costs,
                            measure='max_softmax' if measure == AGREEMENT else measure)
    exits = []
    for k, (accuracy, held_out) in enumerate(zip(test.accuracies(), validation.accuracies())):
        errors = [calibration_error(test.logits[k], test.targets, t) for t in (1., config.temperatures[k])]
        exits.append(ExitResult(
            k + 1, costs.macs[k], costs.params[k], round(accuracy, 3), round(held_out, 3), config.temperatures[k],
            *(round(e, 3) for e in errors)))
    if measure == AGREEMENT:
        budgeted = tuple(_agreements(validation, test, costs))
    else:
        budgeted = tuple(
            _measure(p, p.thresholds, b, p.expected_macs, p.expected_accuracy, test, costs)
            for b, p in config.policies().items())
    return Results(
        validation_images=len(validation.targets), test_images=len(test.targets), measure=measure,
        input_size=tuple(costs.input_size), exits=tuple(exits), budgeted=budgeted,
        oracle=oracle(test, costs.macs)), config


def _measure(
        rule: StoppingRule,
        thresholds: Sequence[float],
        budget: float,
        validation_macs: Optional[float],
        validation_accuracy: Optional[float],
        test: LabelledLogits,
        costs: ExitCosts,
) -> BudgetResult:
    result = simulate(rule, test.logits, costs.macs)
    return BudgetResult(
        budget=round(budget), average_macs=round(result.average_macs), accuracy=round(result.accuracy(test.targets), 3),
        over_budget=round(100. * (result.average_macs / budget - 1.), 3),
        validation_macs=validation_macs, validation_accuracy=validation_accuracy,
        exit_shares=tuple(round(s, 5) for s in result.exit_shares(rule.num_exits)),
        thresholds=tuple(round(t, 6) for t in thresholds))


def _agreements(validation: LabelledLogits, test: LabelledLogits, costs: ExitCosts) -> Iterator[BudgetResult]:
    count = len(costs.macs)
    if count < 2:
        raise InputError('stopping by agreement needs two exits or more')
    for patience in range(1, count):
        rule = Agreement(count, patience)
        held_out = simulate(rule, validation.logits, costs.macs)
        yield _measure(
            rule, (patience,) * count, held_out.average_macs, round(held_out.average_macs),
            round(held_out.accuracy(validation.targets), 3), test, costs)


def write_report(results: Results, folder: Path) -> List[Path]:
    """Writes results.json, exits.csv, budgeted.csv, anytime.png and budgeted.png; returns their paths.

    Each file is written under another name and renamed when complete.

    Raises:
        InputError: the folder cannot be written to.
    """
    from .figures import anytime_figure, budgeted_figure
    folder = Path(folder)
    results.save(folder / RESULTS_NAME)
    write_csv(folder / 'exits.csv', [asdict(e) for e in results.exits])
    rows = []
    for point in results.budgeted:
        row = asdict(point)
        for name in ('exit_shares', 'thresholds'):
            for k, value in enumerate(row.pop(name), 1):
                row[f'{name[:-1]}_{k}'] = value
        rows.append(row)
    write_csv(folder / 'budgeted.csv', rows)
    for name, draw in (('anytime.png', anytime_figure), ('budgeted.png', budgeted_figure)):
        with written_beside(folder / name) as partial:
            draw(results).savefig(partial, dpi=150)
    return [folder / n for n in (RESULTS_NAME, 'exits.csv', 'budgeted.csv', 'anytime.png', 'budgeted.png')]
