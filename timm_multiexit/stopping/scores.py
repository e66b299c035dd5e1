"""Scores of held-out images: all that is kept of them to solve any policy later, without images or network."""
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Tuple, Union

import numpy as np

from ..errors import InputError, first_line
from ..files import written_beside
from .policy import CALIBRATE_HINT, as_array, leaves, probability
from .policy import scores as score_of

FILE_NAME = 'scores.safetensors'
UNKNOWN = -1  # the label of an image without one
_DTYPES = {'I16': np.dtype('<i2'), 'F32': np.dtype('<f4'), 'U8': np.dtype('u1')}
_NAMES = {'predictions': 'I16', 'scores': 'F32', 'labels': 'I16', 'certification': 'U8'}


def check_labelled_logits(
        logits: Sequence[np.ndarray],
        targets: np.ndarray,
        unknown: bool = False,
) -> Tuple[np.ndarray, np.ndarray]:
    """Logits of all exits and their labels as arrays, checked.

    Args:
        logits: One (N, num_classes) per exit, a list or stacked; arrays or tensors.
        targets: Integers (N,), likewise.
        unknown: Whether a label may be unknown, -1.

    Returns:
        Logits float32 (num_exits, N, num_classes) and targets (N,).

    Raises:
        InputError: no exits or images, exits that differ in shape, one class, NaN or infinite logits, or labels that
            are not one per image from 0 to num_classes - 1.
    """
    if len(logits) == 0 or any(x.ndim != 2 or x.shape != logits[0].shape for x in logits):
        raise InputError(
            f'logits of shapes {[tuple(x.shape) for x in logits]}: give one (images, classes) per exit, all alike')
    images, classes = logits[0].shape
    if images == 0:
        raise InputError('logits of no images: give at least one')
    if classes < 2:
        raise InputError('logits of a single class have no confidence: give two or more classes')
    stacked, targets = np.stack([as_array(x).astype(np.float32) for x in logits]), as_array(targets)
    bad = ~np.isfinite(stacked).all(2).all(0)
    if bad.any():
        raise InputError(
            f'{bad.sum()} of {images} images have NaN or infinite logits: check the images and the weights')
    if targets.shape != (images,):
        raise InputError(f'targets of shape {targets.shape} for {images} images: give one label per image')
    if targets.dtype.kind not in 'iu' or targets.min() < (UNKNOWN if unknown else 0) or targets.max() >= classes:
        raise InputError(
            f'labels from {targets.min()} to {targets.max()} for {classes} classes: '
            f'give whole numbers from 0 to {classes - 1}')
    return stacked, targets


@dataclass(frozen=True, eq=False)
class ExitScores:
    """What every exit answers on held-out images, and how confident it is.

    Attributes:
        predictions: Classes, int16 (num_exits, N).
        scores: See `policy.scores`, with the temperatures; float32 (num_exits, N).
        labels: int16 (N,), -1 where unknown.
        certification: Which images served for nothing but a guarantee, bool (N,). The others, the development images,
            may be used for every choice.
    """

    predictions: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    certification: np.ndarray

    @classmethod
    def from_logits(
            cls,
            logits: Any,
            targets: np.ndarray,
            temperatures: Sequence[float],
            measure: str = 'max_softmax',
            certification: Optional[np.ndarray] = None,
    ) -> 'ExitScores':
        """Scores of logits, one (N, num_classes) per exit, with labels (N,); arguments as `check_labelled_logits`."""
        stacked, targets = check_labelled_logits(logits, targets, unknown=True)
        certification = np.zeros(len(targets), bool) if certification is None else np.asarray(certification, bool)
        scores = np.stack([score_of(x, measure, t) for x, t in zip(stacked, temperatures)])
        return cls(stacked.argmax(2).astype(np.int16), scores, targets.astype(np.int16), certification)

    @property
    def num_images(self) -> int:
        return self.scores.shape[1]

    def subset(self, index: np.ndarray) -> 'ExitScores':
        """Those of some images."""
        return ExitScores(self.predictions[:, index], self.scores[:, index], self.labels[index],
                          self.certification[index])

    def joined(self, other: 'ExitScores') -> 'ExitScores':
        """These and the scores of other images.

        Raises:
            InputError: they are of another number of exits.
        """
        if len(self.scores) != len(other.scores):
            raise InputError(f'scores of {len(self.scores)} and of {len(other.scores)} exits cannot be joined')
        return ExitScores(*(np.concatenate([getattr(self, name), getattr(other, name)], -1) for name in _NAMES))

    @property
    def development(self) -> 'ExitScores':
        return self.subset(~self.certification)

    @property
    def for_certification(self) -> 'ExitScores':
        return self.subset(self.certification)

    def correct(self) -> np.ndarray:
        """Whether each exit is right, bool (num_exits, N); False where the label is unknown."""
        return self.predictions == self.labels

    def values(self, measure: str = 'max_softmax') -> np.ndarray:
        """What each answer is worth, float64 (num_exits, N).

        The mean of 0 or 1 for its correctness and of its calibrated probability, which halves the chance in few images;
        where a label is unknown, the probability alone; where the confidence is no probability, correctness alone.
        """
        probable, correct, known = probability(self.scores.astype(np.float64)), self.correct(), self.labels != UNKNOWN
        share = 0.5 if measure == 'max_softmax' else 1.
        return np.where(known, share * correct + (1. - share) * probable, probable)

    def exits(self, thresholds: Union[Sequence[float], np.ndarray]) -> np.ndarray:
        """Exit of each image under thresholds, one per exit; int64 (N,)."""
        exit_index = np.full(self.num_images, len(self.scores) - 1)
        for k in range(len(self.scores) - 2, -1, -1):
            exit_index[leaves(self.scores[k], thresholds[k])] = k
        return exit_index

    def save(self, path: Union[str, Path], digest: str = '', temperatures: Sequence[float] = ()) -> None:
        """Writes safetensors, by NumPy alone, with the digest of the weights and the temperatures that they are of.

        Raises:
            InputError: the file cannot be written.
        """
        header: Dict[str, Any] = {
            '__metadata__': dict(weights=digest, temperatures=json.dumps(list(temperatures)))}
        data = b''
        for name, kind in _NAMES.items():
            array = np.ascontiguousarray(getattr(self, name), _DTYPES[kind])
            header[name] = dict(dtype=kind, shape=array.shape, data_offsets=(len(data), len(data) + array.nbytes))
            data += array.tobytes()
        text = json.dumps(header).encode()
        text += b' ' * (-len(text) % 8)  # the format aligns the data
        with written_beside(Path(path)) as partial:
            partial.write_bytes(len(text).to_bytes(8, 'little') + text + data)

    @classmethod
    def load(cls, path: Union[str, Path]) -> Tuple['ExitScores', Dict[str, str]]:
        """Reads what `save` wrote, with NumPy alone: the scores, and the texts of what they are of.

        Raises:
            InputError: no such file, or not scores.
        """
        try:
            data = Path(path).read_bytes()
            start = 8 + int.from_bytes(data[:8], 'little')
            header = json.loads(data[8:start])
            arrays: Dict[str, np.ndarray] = {}
            for name, kind in _NAMES.items():
                first, end = header[name]['data_offsets']
                if header[name]['dtype'] != kind or not 0 <= first <= end <= len(data) - start:
                    raise ValueError(f'{name} of type {header[name]["dtype"]} at {first} to {end}')
                arrays[name] = np.frombuffer(data[start + first:start + end], _DTYPES[kind]).reshape(
                    header[name]['shape'])
            exits, images = arrays['scores'].shape
            if (arrays['predictions'].shape != (exits, images) or arrays['labels'].shape != (images,)
                    or arrays['certification'].shape != (images,) or not np.isfinite(arrays['scores']).all()):
                raise ValueError('shapes that do not fit together, or scores that are not finite')
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = getattr(error, 'strerror', None) or first_line(error)
            raise InputError(f"scores '{path}' cannot be read ({reason}): {CALIBRATE_HINT}") from error
        arrays['certification'] = arrays['certification'].astype(bool)
        return cls(**arrays), dict(header.get('__metadata__', {}))
