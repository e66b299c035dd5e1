"""What the commands share: options whose values are checked, and signals."""
import argparse
import math
import os
import signal
from contextlib import contextmanager
from typing import Iterator, Optional, Type, Union

import torch

from .errors import first_line


class Interruptions:
    """A context in which SIGINT and SIGTERM raise KeyboardInterrupt with their number."""

    def __enter__(self) -> 'Interruptions':
        self.is_deferred, self.pending = False, 0
        self.before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame) -> None:
        self.pending = number
        if not self.is_deferred:
            raise KeyboardInterrupt(number)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Puts them off to the end of the block."""
        self.is_deferred = True
        yield
        self.is_deferred = False
        if self.pending:
            raise KeyboardInterrupt(self.pending)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str):
        self.exit(2, f'{self.prog}: error: {message} (--help lists the options)\n')


class Number:
    """The type of an option that takes a finite number from `low` to `high`.

    Args:
        kind: int or float.
        low, high: Bounds, allowed themselves.
        but: A bound that is not allowed.
    """

    def __init__(self, kind: Type[Union[int, float]], low: float = -math.inf, high: float = math.inf,
                 but: Optional[float] = None):
        self.kind, self.low, self.high, self.but = kind, low, high, but

    def __call__(self, text: str) -> Union[int, float]:
        try:
            value = self.kind(text)
        except ValueError:
            value = math.nan
        if not self.low <= value <= self.high or value == self.but or value in (math.inf, -math.inf):
            raise argparse.ArgumentTypeError(f"'{text}' is not {self}")
        return value

    def __str__(self) -> str:
        kind = 'an integer' if self.kind is int else 'a number'
        low = '' if self.low == -math.inf else f' from {self.low}'
        high = '' if self.high == math.inf else f' to {self.high}'
        return kind + low + high + (f' other than {self.but}' if self.but is not None else '')


COUNT = Number(int, 1)
WHOLE = Number(int, 0)
THREADS = Number(int, 0, max(os.cpu_count() or 1, 1))
NOT_NEGATIVE = Number(float, 0)
POSITIVE = Number(float, 0, but=0)
SHARE = Number(float, 0, 1)
BELOW_ONE = Number(float, 0, 1, but=1)


def device(text: str) -> str:
    """The type of an option that takes a torch device of this machine."""
    try:
        torch.empty(0, device=text)
    except Exception as error:  # of many types, as the device has
        reason = first_line(error)
        raise argparse.ArgumentTypeError(f"no device '{text}' here ({reason[:100]})") from error
    return text
