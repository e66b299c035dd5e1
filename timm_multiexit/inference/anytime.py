"""Anytime prediction: for the images at hand, the deepest exit that a MACs budget or a deadline allows."""
import math
import statistics
import time
from typing import Dict, Optional, Sequence, Tuple, Union

import numpy as np
import torch

from ..errors import InputError
from ..models import MultiExitNet, exit_costs
from ..stopping.costs import ExitCosts
from ..stopping.policy import confidence
from .engine import Engine, make_engine
from .runner import Run, check_images

_WARM_UP_PASSES = 3
_TIMED_PASSES = 15


class AnytimeRunner:
    """Answers from one exit for all images of a batch, usually a batch of one.

    Args:
        model: The network (a copy is prepared), or an engine made by `engine.make_engine`.
        engine: Engine to make, see `engine.make_engine`.
        costs: Costs of the exits; None to count them at the input size in the network's pretrained cfg.
        temperatures: One per exit, for the confidence; None for 1.

    Raises:
        InputError: an engine that is not available, or costs or temperatures of another number of exits.
    """

    def __init__(
            self,
            model: Union[MultiExitNet, Engine],
            engine: str = 'torch',
            costs: Optional[ExitCosts] = None,
            temperatures: Optional[Sequence[float]] = None,
    ):
        if costs is None:
            if not isinstance(model, MultiExitNet):
                raise InputError('a shared engine needs the exit costs: pass costs=exit_costs(model)')
            costs = exit_costs(model)
        self.costs = costs
        self.temperatures = tuple(temperatures or (1.,) * model.num_exits)
        if not len(self.costs.macs) == len(self.temperatures) == model.num_exits:
            raise InputError(
                f'{len(self.costs.macs)} costs and {len(self.temperatures)} temperatures for a network with '
                f'{model.num_exits} exits: give one per exit')
        self.engine: Engine = make_engine(model, engine) if isinstance(model, MultiExitNet) else model
        self.step_times: Dict[Tuple[int, ...], Tuple[float, ...]] = {}

    def within_budget(self, images: torch.Tensor, budget: float) -> Run:
        """The answer of the deepest exit that costs at most `budget` MACs per image. Earlier heads do not run.

        Args:
            images: (B, C, H, W), normalised.
            budget: MACs per image.

        Raises:
            InputError: no images, NaN logits, or a budget below the first exit.
        """
        k = self.costs.deepest_within(budget)
        check_images(self.engine, images)
        _, logits = self.engine.run(0, k, self.engine.start(images))
        return self._answer(k, logits)

    def within_time(self, images: torch.Tensor, milliseconds: float) -> Run:
        """The answer of the deepest exit that can be reached by the deadline.

        Before each stage, its time on this machine (see `measure`) is compared with the time left. The first call for
        a shape of images measures, before its own time starts. The first exit always answers, however late. Other
        load on the machine can make an answer late.

        Args:
            images: (B, C, H, W), normalised.
            milliseconds: From the call on.

        Raises:
            InputError: no images, NaN logits, or a deadline that is not a positive number.
        """
        if not 0. < milliseconds < math.inf:
            raise InputError(f'a deadline of {milliseconds} ms: give a positive number')
        check_images(self.engine, images)
        if tuple(images.shape) not in self.step_times:
            self.measure(images)
        times = self.step_times[tuple(images.shape)]
        start = time.perf_counter()
        state, logits = self.engine.run(0, 0, self.engine.start(images))
        k = 0
        while k < self.engine.num_exits - 1:
            if 1e3 * (time.perf_counter() - start) + times[k + 1] > milliseconds:
                break
            k += 1
            state, logits = self.engine.run(k, k, state)
        return self._answer(k, logits)

    def measure(self, images: torch.Tensor) -> Tuple[float, ...]:
        """Milliseconds of each stage with its head on these images, kept for their shape.

        A deadline depends on the slow case: the time within which nine of ten passes finish.
        """
        check_images(self.engine, images)
        passes = []
        for number in range(_WARM_UP_PASSES + _TIMED_PASSES):
            state, times = self.engine.start(images), []
            for k in range(self.engine.num_exits):
                start = time.perf_counter()
                state, _ = self.engine.run(k, k, state)  # its logits are on the host: the device has finished
                times.append(1e3 * (time.perf_counter() - start))
            if number >= _WARM_UP_PASSES:
                passes.append(times)
        slow = tuple(statistics.quantiles(column, n=10)[-1] for column in zip(*passes))
        self.step_times[tuple(images.shape)] = slow
        return slow

    def _answer(self, k: int, logits: np.ndarray) -> Run:
        size = (len(logits),)
        return Run(
            torch.full(size, k), torch.from_numpy(logits.argmax(1)),
            torch.from_numpy(confidence(logits, temperature=self.temperatures[k])),
            torch.full(size, self.costs.macs[k]), torch.from_numpy(logits))
