"""Anytime prediction: for images at hand now, the deepest exit that a cost budget or a deadline allows."""
import math
import statistics
import time
from typing import Any, Dict, Optional, Sequence, Tuple, Union

import torch

from ..errors import InputError
from ..models import MultiExitNet, exit_costs
from ..stopping.costs import ExitCosts
from ..stopping.policy import confidence
from .engine import make_engine
from .runner import Run

_WARM_UP_PASSES = 3
_TIMED_PASSES = 15


class AnytimeRunner:
    """Answers from one exit for all images of a batch, most often a batch of one.

    Args:
        model: The network (a copy is prepared), or an engine made by `optimize.make_engine`.
        engine: Engine to make, see `optimize.make_engine`.
        costs: Of the exits; None to count them for the image size of the network's pretrained cfg.
        temperatures: One per exit, for the confidence; None for 1.

    Raises:
        InputError: an engine that cannot be had, or costs or temperatures of another number of exits.
    """

    def __init__(
            self,
            model: Union[MultiExitNet, Any],
            engine: str = 'torch',
            costs: Optional[ExitCosts] = None,
            temperatures: Optional[Sequence[float]] = None,
    ):
        if costs is None:
            if not isinstance(model, MultiExitNet):
                raise InputError('a shared engine needs the costs of the exits: pass costs=exit_costs(model)')
            costs = exit_costs(model)
        self.costs = costs
        self.temperatures = tuple(temperatures or (1.,) * model.num_exits)
        if not len(self.costs.macs) == len(self.temperatures) == model.num_exits:
            raise InputError(
                f'{len(self.costs.macs)} costs and {len(self.temperatures)} temperatures for a network with '
                f'{model.num_exits} exits: give one per exit')
        self.engine = make_engine(model, engine) if isinstance(model, MultiExitNet) else model
        self.step_times: Dict[Tuple[int, ...], Tuple[float, ...]] = {}

    @torch.inference_mode()
    def within_budget(self, images: torch.Tensor, budget: float) -> Run:
        """The answer of the deepest exit that costs at most `budget` MACs an image. Earlier heads do not run.

        Args:
            images: (B, C, H, W), normalised.
            budget: MACs per image.

        Raises:
            InputError: no images, NaN logits, or a budget below the first exit.
        """
        k = self.costs.deepest_within(budget)
        _, logits = self.engine.run(0, k, self.engine.start(self._check(images)))
        return self._answer(k, logits)

    @torch.inference_mode()
    def within_time(self, images: torch.Tensor, milliseconds: float) -> Run:
        """The answer of the deepest exit reached when the next one would miss the deadline.

        Whether it would is told by the times of the stages on this machine, see `measure`; the first call for a shape
        of images measures them before its own time starts. The first exit always answers, however late. Other work on
        the machine can make an answer late.

        Args:
            images: (B, C, H, W), normalised.
            milliseconds: From the call on.

        Raises:
            InputError: no images, NaN logits, or a deadline that is not a positive number.
        """
        if not 0. < milliseconds < math.inf:
            raise InputError(f'a deadline of {milliseconds} ms: give a positive number')
        self._check(images)
        if tuple(images.shape) not in self.step_times:
            self.measure(images)
        times = self.step_times[tuple(images.shape)]
        start = time.perf_counter()
        state, logits = self.engine.run(0, 0, self.engine.start(images))
        k = 0
        while k < self.engine.num_exits - 1:
            self._wait()
            if 1e3 * (time.perf_counter() - start) + times[k + 1] > milliseconds:
                break
            k += 1
            state, logits = self.engine.run(k, k, state)
        return self._answer(k, logits)

    @torch.inference_mode()
    def measure(self, images: torch.Tensor) -> Tuple[float, ...]:
        """Milliseconds of each stage with its head on these images, and remembers them for their shape.

        What counts for a deadline is the slow case: the time that nine of ten passes keep.
        """
        self._check(images)
        passes = []
        for number in range(_WARM_UP_PASSES + _TIMED_PASSES):
            state, times = self.engine.start(images), []
            for k in range(self.engine.num_exits):
                self._wait()
                start = time.perf_counter()
                state, _ = self.engine.run(k, k, state)
                self._wait()
                times.append(1e3 * (time.perf_counter() - start))
            if number >= _WARM_UP_PASSES:
                passes.append(times)
        slow = tuple(statistics.quantiles(column, n=10)[-1] for column in zip(*passes))
        self.step_times[tuple(images.shape)] = slow
        return slow

    def _wait(self) -> None:
        if self.engine.device.type == 'cuda':
            torch.cuda.synchronize(self.engine.device)

    def _check(self, images: torch.Tensor) -> torch.Tensor:
        if not isinstance(images, torch.Tensor) or images.ndim != 4 or len(images) == 0:
            shape = tuple(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
            raise InputError(f'images of shape {shape}: give a tensor (images, channels, height, width), not empty')
        return images

    def _answer(self, k: int, logits: torch.Tensor) -> Run:
        logits = logits.cpu()
        exit_index = torch.full((len(logits),), k)
        macs = torch.full((len(logits),), self.costs.macs[k])
        return Run(
            exit_index, logits.argmax(1), confidence(logits, temperature=self.temperatures[k]), macs, logits)
