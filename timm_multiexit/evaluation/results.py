"""What an evaluation measures, as records: written to results.json and read back here and nowhere else.

Accuracies, calibration errors and gains are in percent or points, costs in MACs for one image.
"""
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Tuple, Union

import numpy as np

from ..errors import InputError
from ..files import read_json, write_json

RESULTS_NAME = 'results.json'


@dataclass(frozen=True)
class ExitResult:
    """One exit alone.

    Attributes:
        exit: Number, from 1.
        macs: Cumulative MACs.
        params: Cumulative parameters.
        accuracy: Top-1 on the test images.
        validation_accuracy: Top-1 on the validation images.
        temperature: Fitted on the validation images.
        calibration_error: Expected calibration error on the test images, without the temperature.
        calibration_error_with_temperature: Likewise, with it.
    """

    exit: int
    macs: int
    params: int
    accuracy: float
    validation_accuracy: float
    temperature: float
    calibration_error: float
    calibration_error_with_temperature: float


@dataclass(frozen=True)
class BudgetResult:
    """One average budget, kept by thresholds from the validation images.

    Attributes:
        budget: Average MACs that the thresholds were solved for.
        average_macs: What the test images took.
        accuracy: Top-1 on the test images.
        over_budget: Average MACs over the budget, in percent of it; negative below.
        validation_macs: Average on the validation images.
        validation_accuracy: Top-1 on the validation images.
        exit_shares: Share of the test images that leave at each exit.
        thresholds: One per exit.
    """

    budget: float
    average_macs: int
    accuracy: float
    over_budget: float
    validation_macs: float
    validation_accuracy: float
    exit_shares: Tuple[float, ...]
    thresholds: Tuple[float, ...]


@dataclass(frozen=True)
class OracleResult:
    """An oracle that stops at the first correct exit among the first `exits`, and at the last of them if none is."""

    exits: int
    average_macs: int
    accuracy: float


@dataclass(frozen=True)
class Comparison:
    """Test accuracy at equal average cost, in points.

    Attributes:
        mean_gain: Of the search over the geometric rule.
        smallest_gain: Its least value over the budgets.
        gains: At each budget.
        mean_gain_fast: Of 'fast' over the search, below 0 where it loses.
        smallest_gain_fast: Its least value over the budgets.
        largest_budget_error: Of all methods and budgets on the test images, in percent of the budget.
    """

    mean_gain: float
    smallest_gain: float
    gains: Tuple[float, ...]
    mean_gain_fast: float
    smallest_gain_fast: float
    largest_budget_error: float


@dataclass(frozen=True, kw_only=True)
class Results:
    """All that an evaluation measures; the order of the attributes is that of results.json.

    Attributes:
        model: Name of the network.
        dataset: timm's name of the data set.
        checkpoint: File name of a user's weights, or None.
        timm_multiexit: Version of the package.
        validation_images: Images on which temperatures and thresholds were set.
        test_images: Images on which everything was measured.
        measure: Confidence measure, see `policy.confidence`.
        input_size: (C, H, W) of an image.
        exits: Shallow to deep.
        budgeted: By method, its budgets in the order solved.
        oracle: For 1, 2, ... exits.
        comparison: Of the methods.
    """

    model: str = ''
    dataset: str = ''
    checkpoint: Optional[str] = None
    timm_multiexit: str = ''
    validation_images: int
    test_images: int
    measure: str
    input_size: Tuple[int, int, int]
    exits: Tuple[ExitResult, ...]
    budgeted: Dict[str, Tuple[BudgetResult, ...]]
    oracle: Tuple[OracleResult, ...]
    comparison: Comparison

    def save(self, path: Union[str, Path]) -> None:
        """Writes results.json.

        Raises:
            InputError: the file cannot be written.
        """
        write_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: Union[str, Path]) -> 'Results':
        """Reads what `save` wrote.

        Raises:
            InputError: no such file, or not the results of an evaluation.
        """
        values = read_json(path, 'results')
        try:
            return cls(**{
                **values,
                'input_size': tuple(values['input_size']),
                'exits': _records(ExitResult, values['exits']),
                'budgeted': {method: _records(BudgetResult, rows) for method, rows in values['budgeted'].items()},
                'oracle': _records(OracleResult, values['oracle']),
                'comparison': _record(Comparison, values['comparison'])})
        except (TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f"'{path}' does not hold the results of timm-multiexit evaluate ({error}): evaluate again") from error


def _record(kind: type, values: Dict[str, Any]) -> Any:
    return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def _records(kind: type, rows: Any) -> tuple:
    return tuple(_record(kind, row) for row in rows)


def curve(rows: Sequence[BudgetResult]) -> np.ndarray:
    """Average MACs and accuracy on the test images, float64 (2, len(rows))."""
    return np.array([[r.average_macs, r.accuracy] for r in rows]).T
