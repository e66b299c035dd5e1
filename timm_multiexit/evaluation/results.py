"""What an evaluation measures, as records: written to results.json and read back here and nowhere else.

Accuracies and calibration errors are in percent or points, costs in MACs for one image.
"""
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Sequence, Tuple, Union

import numpy as np

from ..errors import InputError
from ..files import read_json, write_json

RESULTS_NAME = 'results.json'


@dataclass(frozen=True)
class ExitResult:
    """One exit alone."""

    exit: int  # number, from 1
    macs: int  # cumulative
    params: int  # cumulative
    accuracy: float  # top-1 on the test images
    validation_accuracy: float  # top-1 on the validation images
    temperature: float  # fitted on the validation images
    calibration_error: float  # expected calibration error on the test images, without the temperature
    calibration_error_with_temperature: float  # likewise, with it


@dataclass(frozen=True)
class BudgetResult:
    """One average budget, kept by thresholds from the validation images."""

    budget: float  # average MACs that the thresholds were solved for
    average_macs: int  # what the test images took
    accuracy: float  # top-1 on the test images
    over_budget: float  # average MACs over the budget, in percent of it; negative below
    validation_macs: float  # average on the validation images
    validation_accuracy: float  # top-1 on the validation images
    exit_shares: Tuple[float, ...]  # share of the test images that leave at each exit
    thresholds: Tuple[float, ...]  # one per exit; of 'agreement' the patience, for each


@dataclass(frozen=True)
class OracleResult:
    """An oracle that stops at the first correct exit among the first `exits`, and at the last of them if none is."""

    exits: int
    average_macs: int
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class Results:
    """All that an evaluation measures; the order of the attributes is that of results.json."""

    model: str = ''  # name of the network
    dataset: str = ''  # timm's name of the data set
    checkpoint: Optional[str] = None  # file name of a user's weights, or None
    timm_multiexit: str = ''  # version of the package
    validation_images: int  # on which temperatures and thresholds were set
    test_images: int  # on which everything was measured
    measure: str  # confidence measure, see `policy.scores`, or 'agreement'
    input_size: Tuple[int, int, int]  # (C, H, W) of an image
    exits: Tuple[ExitResult, ...]  # shallow to deep
    budgeted: Tuple[BudgetResult, ...]  # average budgets, rising
    oracle: Tuple[OracleResult, ...]  # for 1, 2, ... exits

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
                'budgeted': _records(BudgetResult, values['budgeted']),
                'oracle': _records(OracleResult, values['oracle'])})
        except (TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f"'{path}' does not hold the results of timm-multiexit evaluate ({error}): evaluate again") from error


def _records(kind: type, rows: Any) -> tuple:
    return tuple(kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in row.items()}) for row in rows)


def curve(rows: Sequence[BudgetResult]) -> np.ndarray:
    """Average MACs and accuracy on the test images, float64 (2, len(rows))."""
    return np.array([[r.average_macs, r.accuracy] for r in rows]).T
