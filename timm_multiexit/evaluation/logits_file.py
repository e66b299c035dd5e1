"""Logits of a network of any kind, from a .npz file, for `evaluate` and `compare`."""
from pathlib import Path
from typing import Tuple
from zipfile import BadZipFile

import numpy as np
import torch

from ..errors import InputError
from ..stopping.costs import ExitCosts
from ..stopping.scores import check_labelled_logits
from .evaluate import LabelledLogits

SUFFIX = '.npz'
LOGITS_HELP = ('logits (exits, images, classes), labels (images,), held_out (images,), true where thresholds are set, '
               'cumulative macs (exits,) and, to compare with other files, dataset, like torch/cifar10')


def read_logits(path: Path) -> Tuple[LabelledLogits, LabelledLogits, ExitCosts, str]:
    """The logits of a network of any kind.

    Args:
        path: A .npz file with the arrays of `LOGITS_HELP`.

    Returns:
        Validation and test images, the costs, and the name of the data set, '' if it is not stored.

    Raises:
        InputError: not such a file, or arrays that cannot be used.
    """
    names = ('logits', 'labels', 'held_out', 'macs')
    try:
        with np.load(path, allow_pickle=False) as stored:
            logits, labels, held_out, macs = (stored[name] for name in names)
            dataset = str(stored['dataset']) if 'dataset' in stored else ''
    except FileNotFoundError:
        raise InputError(f"'{path}' is not a file") from None
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
        raise InputError(f"'{path}' is not a .npz file with {LOGITS_HELP} ({error})") from None
    if logits.ndim != 3 or held_out.shape != logits.shape[1:2] or held_out.dtype != bool:
        raise InputError(f"logits {logits.shape} and held_out {held_out.shape} of type {held_out.dtype} in '{path}': "
                         'give (exits, images, classes), and (images,) of type bool')
    if not 0 < held_out.sum() < len(held_out):
        raise InputError(f"held_out in '{path}' is true for {held_out.sum()} of {len(held_out)} images: mark some to "
                         'set thresholds on, and leave some to measure on')
    if (macs.shape != logits.shape[:1] or macs.dtype.kind not in 'iuf' or not np.isfinite(macs).all()
            or macs[0] < 1000 or (np.diff(macs) <= 0).any()):
        raise InputError(f"macs {macs.tolist()} in '{path}': give the cumulative multiply-adds of {len(logits)} exits, "
                         'not in millions, rising')
    try:
        logits, labels = check_labelled_logits(logits, labels)
    except InputError as error:
        raise InputError(f"'{path}': {error}") from None
    targets = labels.astype(np.int64)
    validation, test = (LabelledLogits(torch.from_numpy(logits[:, rows]), torch.from_numpy(targets[rows]))
                        for rows in (held_out, ~held_out))
    # Parameters and image size are not known, and not compared.
    return validation, test, ExitCosts(tuple(int(m) for m in macs), (1,) * len(macs), (1, 1, 1)), dataset
