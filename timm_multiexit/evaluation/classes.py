"""Accuracy class by class, and which classes are taken for which."""
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import List, Sequence, Tuple

import torch

from ..files import write_csv

CLASSES_NAME = 'classes.csv'


@dataclass(frozen=True)
class ClassResult:
    """One class among the test images.

    Attributes:
        name: Its name.
        images: How many there are of it.
        accuracy: Share of them that the last exit classifies correctly, in percent.
        taken_for: The class that most of the others are taken for, '' if there are none.
        taken: How many are.
    """

    name: str
    images: int
    accuracy: float
    taken_for: str
    taken: int


def class_results(predictions: torch.Tensor, targets: torch.Tensor, names: Sequence[str]) -> Tuple[ClassResult, ...]:
    """Results of each class that has images; predictions and targets are int64 (N,)."""
    count = len(names)
    matrix = torch.bincount(targets * count + predictions, minlength=count * count).view(count, count)
    rows = []
    for k, row in enumerate(matrix):
        total, correct = int(row.sum()), int(row[k])
        if total:
            wrong = row.clone()
            wrong[k] = 0
            other = int(wrong.argmax()) if wrong.any() else None
            rows.append(ClassResult(names[k], total, round(100. * correct / total, 2),
                                    '' if other is None else names[other], int(wrong.max())))
    return tuple(rows)


def balanced_accuracy(rows: Sequence[ClassResult]) -> float:
    """Mean of the classes' accuracies in percent: each class counts the same, however many images it has."""
    return sum(row.accuracy for row in rows) / len(rows)


def most_confused(rows: Sequence[ClassResult]) -> List[ClassResult]:
    """The five classes of which the largest shares are taken for one other class."""
    confused = [row for row in rows if row.taken]
    return sorted(confused, key=lambda row: row.taken / row.images, reverse=True)[:5]


def write_classes(rows: Sequence[ClassResult], path: Path) -> None:
    """Writes a CSV table with a line for each class.

    Raises:
        InputError: the file cannot be written.
    """
    write_csv(path, [asdict(row) for row in rows])
