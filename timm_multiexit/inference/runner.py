"""The early-exit runner: batches, loaders and folders under a stopping rule, over threads and processes."""
import itertools
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import length_hint
from pathlib import Path
from typing import Any, Iterable, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from ..errors import InputError
from ..models import MultiExitNet, exit_costs
from ..stopping.costs import ExitCosts
from ..stopping.monitor import ExitMonitor
from ..stopping.policy import StoppingRule, check_exits
from ..stopping.simulate import Simulation
from .batch_loop import Answers, Segment, run_batch, run_one, segments_of
from .engine import Engine, make_engine
from .images import image_paths
from .preprocess import Preprocessing

# Images that run together. Their maps stay in a core's cache: on a CPU with 1 MB of it, 32 images took 10 to 20 % less
# time each than 128 or 256, and 8 took 30 % more.
CHUNK_SIZE = 32
CHUNK_SIZE_GPU = 1024


@dataclass(frozen=True)
class Run(Simulation):
    """The result of a run, in input order: tensors on the CPU; see `Simulation`.

    Attributes:
        logits: Logits of the exit that answered, float32 (N, num_classes).
        targets: Labels, int64 (N,), if the images came with them.
    """

    logits: Optional[torch.Tensor] = None
    targets: Optional[torch.Tensor] = None


class EarlyExitRunner:
    """Runs images under a stopping rule; no stage runs on an image that has left, or when no image remains.

    With the onnx engine the exit and the logits of an image do not depend on its batch, to the last bit. With PyTorch
    logits agree up to rounding, so an image whose confidence nearly ties with a threshold may leave elsewhere. Heads of
    exits that the rule does not use do not run.

    Under torchrun, once the process group is up, each process runs its share of the images, and every process returns
    the result for all of them. All processes must be given the same images in the same order.

    Args:
        model: The network (a copy is prepared), or an engine made by `engine.make_engine`, to share between runners.
        policy: When to stop: an `ExitPolicy`, or any `stopping.policy.StoppingRule`.
        engine: Engine to make, see `engine.make_engine`.
        costs: Costs of the exits; None to count them at the input size in the network's pretrained cfg.
        chunk_size: Images that run together.
        monitor: Told where images leave, batch by batch; the next batches run under its policy.

    Raises:
        InputError: a policy for another number of exits, or an engine that is not available.
    """

    def __init__(
            self,
            model: Union[MultiExitNet, Engine],
            policy: StoppingRule,
            engine: str = 'torch',
            costs: Optional[ExitCosts] = None,
            chunk_size: Optional[int] = None,
            monitor: Optional[ExitMonitor] = None,
    ):
        check_exits(policy, model.num_exits)
        self.model = model if isinstance(model, MultiExitNet) else None
        if costs is None:
            if self.model is None:
                raise InputError('a runner of a shared engine needs the exit costs: pass costs=exit_costs(model)')
            costs = exit_costs(self.model)
        self.costs = costs
        check_exits(policy, len(self.costs.macs))
        self.engine: Engine = make_engine(model, engine) if isinstance(model, MultiExitNet) else model
        self.monitor = monitor
        self.chunk_size = chunk_size or (CHUNK_SIZE if self.engine.device.type == 'cpu' else CHUNK_SIZE_GPU)
        self.policy = policy
        self.macs = torch.tensor(self.costs.macs)
        self._pool: Optional[ThreadPoolExecutor] = None
        self._pool_process = 0

    @property
    def policy(self) -> StoppingRule:
        """When to stop."""
        return self._stopping[0]

    @policy.setter
    def policy(self, policy: StoppingRule) -> None:
        segments = segments_of(policy)
        self.engine.build(segments)
        self._stopping = policy, segments  # in one step: other threads may be about to start a batch

    @property
    def segments(self) -> Sequence[Segment]:
        """Runs of stages (first, last) between the exits in use."""
        return self._stopping[1]

    @property
    def pool(self) -> Optional[ThreadPoolExecutor]:
        """The worker threads; a forked process inherits none of them, so each process makes its own."""
        if self.engine.workers > 1 and self._pool_process != os.getpid():
            self._pool, self._pool_process = ThreadPoolExecutor(self.engine.workers), os.getpid()
        return self._pool

    def __call__(self, data: Any, **kwargs) -> Run:
        """Runs a tensor, a folder (str or Path; the paths are `image_paths` of it), or an iterable of batches."""
        if isinstance(data, torch.Tensor):
            return self.run(data, **kwargs)
        if isinstance(data, (str, Path)):
            return self.run_folder(data, **kwargs)[1]
        return self.run_loader(data, **kwargs)

    def run(self, images: torch.Tensor, batch_size: int = 256) -> Run:
        """Runs images (N, C, H, W), normalised with the network's mean and deviation.

        Args:
            images: On any device.
            batch_size: Images among which those that go on are regrouped.

        Raises:
            InputError: no images, not images of this network, or NaN logits.
        """
        check_images(self.engine, images)
        _check_batch_size(batch_size)
        rank, world = _process()
        if len(images) == 1 and world == 1:  # nothing to share or put in order
            return self._result(self._watched(self._job(images)), None)
        if self.pool is not None:  # a share for each worker, also of a single batch
            batch_size = min(batch_size, -(-len(images) // (world * self.engine.workers)))
        batches = images.split(batch_size)
        mine = range(rank, len(batches), world)
        rows = self._map(batches[i] for i in mine)
        return self._finish((i, None, x) for i, x in zip(mine, rows))

    def run_loader(self, loader: Iterable) -> Run:
        """Runs every batch of a loader.

        Args:
            loader: Yields images (B, C, H, W), or (images, targets); targets may be a tensor, an array or a list.

        Raises:
            InputError: nothing in the loader, not images of this network, or NaN logits.
        """
        rank, world = _process()
        targets = deque()

        def images() -> Iterator[torch.Tensor]:
            for i, batch in enumerate(loader):
                x, *more = batch if isinstance(batch, (list, tuple)) else (batch,)
                y = more[0] if more else None
                check_images(self.engine, x)
                if i % world == rank:
                    targets.append((i, None if y is None else torch.as_tensor(y)))
                    yield x

        total = -(-length_hint(loader) // world) or None  # a loader of a stream has no length
        bar = tqdm(self._map(images()), unit='batch', total=total, disable=True if rank else None)
        return self._finish((*targets.popleft(), rows) for rows in bar)

    def run_folder(self, folder: Union[str, Path], batch_size: int = 256) -> Tuple[List[Path], Run]:
        """Runs the image files of a folder, its subfolders included, under the network's test transform.

        Returns:
            The files, sorted, and what the run gave for them.

        Raises:
            InputError: no folder, no images in it, one that cannot be read, or NaN logits.
        """
        _check_batch_size(batch_size)
        if self.model is None:
            raise InputError('a runner of a shared engine has no transform: make one from the network itself')
        paths = image_paths(folder)
        preprocess = Preprocessing.of(self.model)
        rank, world = _process()
        batches = [paths[i:i + batch_size] for i in range(0, len(paths), batch_size)]
        mine = range(rank, len(batches), world)
        images = (torch.stack([preprocess(p)[0] for p in batches[i]]) for i in mine)
        bar = tqdm(self._map(images), unit='batch', total=len(mine), disable=True if rank else None)
        return paths, self._finish((i, None, rows) for i, rows in zip(mine, bar))

    def _map(self, batches: Iterable[torch.Tensor]) -> Iterator[Answers]:
        """Answers for each batch, in order; one batch per worker at a time, and one waiting."""
        batches, pool = iter(batches), self.pool
        if pool is None:
            yield from map(self._watched, map(self._job, batches))
            return
        first = list(itertools.islice(batches, 2))
        if len(first) == 1:  # a single one: no thread has to wake up
            yield self._watched(self._job(first[0]))
            return
        waiting = deque(pool.submit(self._job, batch) for batch in first)
        try:
            for batch in batches:
                if len(waiting) > self.engine.workers:
                    yield self._watched(waiting.popleft().result())
                waiting.append(pool.submit(self._job, batch))
            while waiting:
                yield self._watched(waiting.popleft().result())
        finally:
            for future in waiting:
                future.cancel()

    def _job(self, images: torch.Tensor) -> Answers:
        policy, segments = self._stopping
        if len(images) == 1:
            return run_one(self.engine, policy, segments, images)
        return run_batch(self.engine, policy, segments, images, self.chunk_size)

    def _watched(self, answers: Answers) -> Answers:
        if self.monitor is not None:
            self.monitor.update(answers.exit_index)
            if self.monitor.policy is not self.policy:
                self.policy = self.monitor.policy
        return answers

    def _finish(self, answers: Iterable[Tuple[int, Optional[torch.Tensor], Answers]]) -> Run:
        """One result of numbered batches: from all processes, in the order of the numbers."""
        try:
            mine = [(i, None if y is None else y.cpu(), rows) for i, y, rows in answers]
        except InputError as error:
            mine = error
        gathered: List[Any] = [mine]
        if _process()[1] > 1:  # an error too, or the other processes would wait for ever
            gathered = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, mine)
        for part in gathered:
            if isinstance(part, InputError):
                raise part
        numbered = sorted(itertools.chain(*gathered), key=lambda answer: answer[0])
        if not numbered:
            raise InputError('there are no images to run: check the loader')
        targets = [y for _, y, _ in numbered]
        return self._result(
            Answers(*(np.concatenate(parts) for parts in zip(*(rows for _, _, rows in numbered)))),
            None if any(y is None for y in targets) else torch.cat(targets))

    def _result(self, answers: Answers, targets: Optional[torch.Tensor]) -> Run:
        exit_index, prediction, confidence, logits = map(torch.from_numpy, answers)
        return Run(exit_index, prediction, confidence, self.macs[exit_index], logits, targets)


def check_images(engine: Engine, images: torch.Tensor) -> None:
    """Checks that a batch is what an engine runs on.

    Raises:
        InputError: no float tensor (B, C, H, W) with its channels and size, empty, or in a precision below its own.
    """
    chans = engine.in_chans
    if not isinstance(images, torch.Tensor) or images.ndim != 4 or images.shape[1] != chans:
        kind = type(images).__name__
        given = f'shape {tuple(images.shape)}' if isinstance(images, torch.Tensor) else f'type {kind}'
        raise InputError(f'images of {given}: give a tensor (images, {chans}, height, width)')
    height, width = images.shape[2:]
    if engine.image_size not in (None, (height, width)):
        raise InputError(f'images of {height} x {width} pixels: this engine takes {engine.image_size[0]} x '
                         f'{engine.image_size[1]}, resize them or use the torch engine')
    if len(images) == 0:
        raise InputError('an empty batch: give at least one image')
    if not images.is_floating_point():
        raise InputError(f'images of {images.dtype}: normalise them to floats first, as the network was trained')
    if torch.finfo(images.dtype).bits < torch.finfo(engine.dtype).bits:  # what they lost moves images between exits
        raise InputError(f'images of {images.dtype} for an engine of {engine.dtype}: give them in that precision')


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise InputError(f'batch_size {batch_size}: give 1 or more')


def _process() -> Tuple[int, int]:
    """This process's number and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
