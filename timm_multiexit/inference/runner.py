"""Running a network under a policy so that stopping early really saves time.

batch -> segment up to the first exit in use -> sure images leave -> the others are regrouped -> next segment -> ...
"""
import itertools
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, Iterator, List, NamedTuple, Optional, Tuple, Union

import torch
import torch.distributed as dist
from timm.data import create_transform, resolve_data_config
from tqdm import tqdm

from ..errors import InputError
from ..models import MultiExitNet, exit_costs
from ..stopping.costs import ExitCosts
from ..stopping.policy import NEVER, ExitPolicy
from ..stopping.simulate import Simulation
from .engine import make_engine
from .images import read_image

# Images that run together. Their maps stay in a core's cache: on a CPU with 1 MB of it, 32 images took 10 to 20 % less
# time each than 128 or 256, and 8 took 30 % more.
CHUNK_SIZE = 32
# Compacting copies the state of those that stay, which costs about 3 % of running them on.
COMPACT_BELOW = 0.95


@dataclass(frozen=True)
class Run(Simulation):
    """What a run under a policy gave, in input order; see `policy.Simulation`.

    Attributes:
        logits: Logits of the exit that answered, float32 (N, num_classes).
        targets: Labels, int64 (N,), if the images came with them.
    """

    logits: torch.Tensor = None
    targets: Optional[torch.Tensor] = None


class _Rows(NamedTuple):
    """Answers about some images of a job."""
    exit_index: torch.Tensor
    prediction: torch.Tensor
    confidence: torch.Tensor
    logits: torch.Tensor


class EarlyExitRunner:
    """Runs images under a policy; no stage runs on an image that has left, and none when no image is left.

    The exit and logits of an image are those of the first exit at which the policy stops it, whatever batch it is in.
    At an exit whose threshold is `policy.NEVER` no head runs.

    Under torchrun, once the process group stands, each process runs its share of the images, and every process
    returns the result of all of them. All processes must be given the same images in the same order.

    Args:
        model: The network (a copy is prepared), or an engine made by `optimize.make_engine`, to share between runners.
        policy: When to stop.
        engine: Engine to make, see `optimize.make_engine`.
        costs: Of the exits; None to count them for the image size of the network's pretrained cfg.
        chunk_size: Images that run together; larger pays on a GPU.

    Raises:
        InputError: a policy for another number of exits, or an engine that cannot be had.
    """

    def __init__(
            self,
            model: Union[MultiExitNet, Any],
            policy: ExitPolicy,
            engine: str = 'torch',
            costs: Optional[ExitCosts] = None,
            chunk_size: Optional[int] = None,
    ):
        policy.check_exits(model.num_exits)
        self.model = model if isinstance(model, MultiExitNet) else None
        if self.model is None and costs is None:
            raise InputError('a runner of a shared engine needs the costs of the exits: pass costs=exit_costs(model)')
        self.costs = costs or exit_costs(model)
        policy.check_exits(len(self.costs.macs))
        self.engine = make_engine(model, engine) if self.model is not None else model
        self.policy = policy
        self.chunk_size = chunk_size or (CHUNK_SIZE if self.engine.device.type == 'cpu' else 1024)
        last = model.num_exits - 1
        used = [k for k, t in enumerate(policy.thresholds) if t < NEVER or k == last]
        self.segments = tuple(zip([0, *(k + 1 for k in used)], used))
        self.engine.build(self.segments)
        self.macs = torch.tensor(self.costs.macs)
        self.pool = ThreadPoolExecutor(self.engine.workers) if self.engine.workers > 1 else None

    def __call__(self, data: Any, **kwargs) -> Run:
        """Runs a tensor, a folder (str or Path; the paths are `image_paths` of it), or an iterable of batches."""
        if isinstance(data, torch.Tensor):
            return self.run(data, **kwargs)
        if isinstance(data, (str, Path)):
            return self.run_folder(data, **kwargs)[1]
        return self.run_loader(data, **kwargs)

    def run(self, images: torch.Tensor, batch_size: int = 256) -> Run:
        """Runs images (N, C, H, W), normalised as the network wants them.

        Args:
            images: On any device.
            batch_size: Images among which those that go on are regrouped.

        Raises:
            InputError: no images, not images of this network, or NaN logits.
        """
        self._check(images)
        if batch_size < 1:
            raise InputError(f'batch_size {batch_size}: give 1 or more')
        rank, world = _process()
        if len(images) == 1 and world == 1:  # nothing to share, regroup or put in order
            return self._result(self._one(images), None)
        if self.pool is not None:  # a share for each worker, also of a single batch
            batch_size = min(batch_size, -(-len(images) // (world * self.engine.workers)))
        batches = images.split(batch_size)
        mine = range(rank, len(batches), world)
        rows = self._map(batches[i] for i in mine)
        return self._finish((i, None, x) for i, x in zip(mine, rows))

    def run_loader(self, loader: Iterable, label: str = '') -> Run:
        """Runs every batch of a loader.

        Args:
            loader: Yields images (B, C, H, W), or (images, targets).
            label: Of the progress bar, which appears on terminals only.

        Raises:
            InputError: nothing in the loader, not images of this network, or NaN logits.
        """
        rank, world = _process()
        targets = deque()

        def images() -> Iterator[torch.Tensor]:
            for i, batch in enumerate(loader):
                x, y = batch[:2] if isinstance(batch, (list, tuple)) else (batch, None)
                self._check(x)
                if i % world == rank:
                    targets.append((i, y))
                    yield x

        total = -(-len(loader) // world) if hasattr(loader, '__len__') else None
        bar = tqdm(self._map(images()), desc=label, unit='batch', total=total, disable=True if rank else None)
        return self._finish((*targets.popleft(), rows) for rows in bar)

    def run_folder(self, folder: Union[str, Path], batch_size: int = 256) -> Tuple[List[Path], Run]:
        """Runs the image files of a folder, its subfolders included, under the network's test transform.

        Returns:
            The files, sorted, and what the run gave for them.

        Raises:
            InputError: no folder, no images in it, one that cannot be read, or NaN logits.
        """
        if self.model is None:
            raise InputError('a runner of a shared engine knows no transform: make one from the network itself')
        paths = image_paths(folder)
        config = resolve_data_config(model=self.model)
        transform = create_transform(**config)
        size = config['input_size'][-1]
        rank, world = _process()
        batches = [paths[i:i + batch_size] for i in range(0, len(paths), batch_size)]
        mine = range(rank, len(batches), world)
        images = (torch.stack([transform(read_image(p, size)[0]) for p in batches[i]]) for i in mine)
        bar = tqdm(self._map(images), unit='batch', total=len(mine), disable=True if rank else None)
        return paths, self._finish((i, None, rows) for i, rows in zip(mine, bar))

    def _check(self, images: torch.Tensor) -> None:
        chans = self.engine.in_chans
        if not isinstance(images, torch.Tensor) or images.ndim != 4 or images.shape[1] != chans:
            shape = tuple(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
            raise InputError(f'images of shape {shape}: give a tensor (images, {chans}, height, width)')
        if len(images) == 0:
            raise InputError('an empty batch: give at least one image')
        if not images.is_floating_point():
            raise InputError(f'images of {images.dtype}: normalise them to floats first, as the network was trained')

    def _map(self, batches: Iterable[torch.Tensor]) -> Iterator[_Rows]:
        """Answers for each batch, in order; as many batches at once as the engine has workers, and one waiting."""
        batches = iter(batches)
        if self.pool is None:
            yield from map(self._job, batches)
            return
        first = list(itertools.islice(batches, 2))
        if len(first) == 1:  # a single one: no thread needs to be woken
            yield self._job(first[0])
            return
        waiting = deque(self.pool.submit(self._job, batch) for batch in first)
        try:
            for batch in batches:
                if len(waiting) > self.engine.workers:
                    yield waiting.popleft().result()
                waiting.append(self.pool.submit(self._job, batch))
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    @torch.inference_mode()
    def _one(self, images: torch.Tensor) -> _Rows:
        """Runs a batch of one image, which has nothing to keep apart: what `_job` costs around it would be seen."""
        state = self.engine.start(images)
        for first, k in self.segments:
            state, logits = self.engine.run(first, k, state)
            confidence = self.policy.confidence(k, logits)
            if k == self.policy.num_exits - 1 or bool(confidence >= self.policy.thresholds[k]):
                break
        return _Rows(torch.full((1,), k, device=logits.device), logits.argmax(1), confidence, logits)

    @torch.inference_mode()
    def _job(self, images: torch.Tensor) -> _Rows:
        """Runs one batch through the segments."""
        if len(images) == 1:
            return self._one(images)
        engine, size, device = self.engine, len(images), self.engine.device
        answers = _Rows(
            torch.empty(size, dtype=torch.int64, device=device),
            torch.empty(size, dtype=torch.int64, device=device),
            torch.empty(size, device=device),
            torch.empty(size, engine.num_classes, device=device))
        # A chunk is a state and whose rows it holds: numbers of images, -1 for those that have left.
        owners = torch.arange(size, device=device)
        chunks = [(engine.start(x), ids) for x, ids in
                  zip(images.split(self.chunk_size), owners.split(self.chunk_size))]
        for first, k in self.segments:
            pieces = []
            for state, ids in chunks:
                state, logits = engine.run(first, k, state)
                confidence = self.policy.confidence(k, logits)
                present = ids >= 0
                if k == self.policy.num_exits - 1:
                    leave = present
                else:
                    leave = (confidence >= self.policy.thresholds[k]) & present
                count, remain = int(leave.sum()), int(present.sum())
                if count == len(ids):
                    _write(answers, ids, k, logits, confidence)
                    continue
                if count:
                    rows = leave.nonzero()[:, 0]
                    _write(answers, ids[rows], k, logits[rows], confidence[rows])
                    ids = ids.masked_fill(leave, -1)
                if count < remain:
                    pieces.append((state, ids, remain - count))
            chunks = self._regroup(pieces)
            if not chunks:
                break
        return answers

    def _regroup(self, pieces: List[Tuple[Any, torch.Tensor, int]]) -> List[Tuple[Any, torch.Tensor]]:
        """Chunks for the next segment: neighbours that fit into one are joined, and those who left are dropped.

        Args:
            pieces: State, owners of its rows (-1 for those that have left), and how many are there.
        """
        groups: List[list] = []
        filled = 0
        for piece in pieces:
            if groups and filled + piece[2] <= self.chunk_size:
                groups[-1].append(piece)
                filled += piece[2]
            else:
                groups.append([piece])
                filled = piece[2]
        chunks = []
        for group in groups:
            if len(group) == 1 and group[0][2] > COMPACT_BELOW * len(group[0][1]):
                chunks.append(group[0][:2])
                continue
            parts, owners = [], []
            for state, ids, count in group:
                rows = None if count == len(ids) else (ids >= 0).nonzero()[:, 0]
                parts.append((state, rows))
                owners.append(ids if rows is None else ids[rows])
            chunks.append((self.engine.gather(parts), torch.cat(owners)))
        return chunks

    def _finish(self, answers: Iterable[Tuple[int, Optional[torch.Tensor], _Rows]]) -> Run:
        """One result of numbered batches: from all processes, in the order of the numbers."""
        try:
            mine = [(i, None if y is None else y.cpu(), _Rows(*(x.cpu() for x in rows))) for i, y, rows in answers]
        except InputError as error:
            mine = error
        gathered = [mine]
        if _process()[1] > 1:  # an error too: else the other processes would wait for ever
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
            _Rows(*(torch.cat(parts) for parts in zip(*(rows for _, _, rows in numbered)))),
            None if any(y is None for y in targets) else torch.cat(targets))

    def _result(self, rows: _Rows, targets: Optional[torch.Tensor]) -> Run:
        exit_index, prediction, confidence, logits = (x.cpu() for x in rows)
        return Run(exit_index, prediction, confidence, self.macs[exit_index], logits, targets)


def _write(answers: _Rows, ids: torch.Tensor, k: int, logits: torch.Tensor, confidence: torch.Tensor) -> None:
    answers.exit_index[ids] = k
    answers.prediction[ids] = logits.argmax(1)
    answers.confidence[ids] = confidence
    answers.logits[ids] = logits


def _process() -> Tuple[int, int]:
    """This process's number and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def image_paths(folder: Union[str, Path]) -> List[Path]:
    """The image files of a folder and its subfolders, by their suffix, sorted.

    Raises:
        InputError: no folder, or none in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"'{folder}' is not a folder: give a folder of images")
    from timm.data.readers.img_extensions import get_img_extensions
    suffixes = get_img_extensions(as_set=True)
    paths = sorted(p for p in folder.rglob('*') if p.suffix.lower() in suffixes)
    if not paths:
        raise InputError(f"'{folder}' holds no images: give a folder of {', '.join(sorted(suffixes))} files")
    return paths
