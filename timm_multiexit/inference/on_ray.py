"""What `serve` and `predict` do, on Ray: in many processes, of this machine or of the cluster that RAY_ADDRESS names.

Ray starts, places and restarts the processes. The HTTP server and the records stay in the one that asks for them.
"""
import asyncio
import logging
import math
import os
import signal
import socket
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Sequence, Tuple, Union, cast

import numpy as np
import ray
from ray import serve
from ray.data import DataContext, from_items
from ray.exceptions import RayTaskError
from tqdm import tqdm

from ..errors import InputError, first_line
from ..stopping.config import ExitConfig
from ..stopping.policy import ExitPolicy
from .batch_loop import Answers, Segment, segments_of
from .device import FolderEngine
from .predict import part_path, write_parts
from .segment_queues import Places, Waiting, run_segment
from .sources import ImageSource, count_images

TASKS_PER_CPU = 8  # of predict: fewer end unevenly, and each one passes over what comes before its parts


@contextmanager
def connected() -> Iterator[int]:
    """Connects to the cluster that RAY_ADDRESS names, or starts a Ray that ends with the block; gives its CPUs.

    Raises:
        InputError: neither is possible.
    """
    address = os.environ.get('RAY_ADDRESS') or 'local'
    os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')  # it reports to its makers
    for name in ('ray.data', 'ray.serve'):
        logging.getLogger(name).setLevel(logging.ERROR)
    DataContext.get_current().enable_progress_bars = False
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address, include_dashboard=False if address == 'local' else None, log_to_driver=False,
                 logging_level=logging.ERROR)
    except Exception as error:  # a plain one if it starts too slowly
        where = 'cannot be started' if address == 'local' else f'at RAY_ADDRESS={address} cannot be reached'
        raise InputError(f'Ray {where} ({first_line(error)}): try again, or without --ray') from error
    finally:
        signal.signal(signal.SIGTERM, before)  # it takes the signal for itself
    try:
        yield int(ray.cluster_resources()['CPU'])
    finally:
        ray.shutdown()


def _reopened(folder: Path, graphs: Dict[str, Any]) -> FolderEngine:
    """The network of a folder in another process, unless it has been exported again since."""
    engine = FolderEngine(folder)
    if engine.graphs != graphs:
        raise InputError(f"'{folder}' holds another network than at the start: put that back, or start anew")
    return engine


class Segments:
    """A deployment: segments that follow one another, and a handle to what comes after them."""

    def __init__(self, folder: Path, graphs: Dict[str, Any], rule: ExitPolicy, segments: Sequence[Segment],
                 batch_size: int, deeper: Any):
        self.engine, self.rule, self.segments, self.deeper = _reopened(folder, graphs), rule, segments, deeper
        self.engine.build(segments)
        self.batched.set_max_batch_size(batch_size)  # pyright: ignore[reportAttributeAccessIssue]

    async def __call__(self, waiting: Waiting) -> Answers:
        found = await self.batched(waiting)
        return found if isinstance(found, Answers) else await self.deeper.remote(found)

    @serve.batch(batch_wait_timeout_s=0.)
    async def batched(self, batch: List[Waiting]) -> List[Union[Answers, Waiting]]:
        return await asyncio.to_thread(self._run, batch)

    def _run(self, batch: List[Waiting]) -> List[Union[Answers, Waiting]]:
        found: List[Any] = list(batch)
        for segment in self.segments:
            staying = [i for i, result in enumerate(found) if isinstance(result, Waiting)]
            if staying:
                for i, result in zip(staying, run_segment(
                        self.engine, self.rule, segment, [found[i] for i in staying])):
                    found[i] = result
        return [result if isinstance(result, Answers) else Waiting(  # its row alone is sent
            self.engine.gather([(result.state, np.array([result.row]))]), 0, result.memory) for result in found]


class RayQueues(Places):
    """Runs images under a stopping rule in deployments of Ray Serve; see `segment_queues.SegmentQueues`.

    Args:
        engine: Engine of a folder that all machines have under this path.
        rule: When to stop.
        replicas: For each deployment; they share the segments evenly.
        batch_size: Images that run together at most.
        limit: Images that `places` admits at once.
        name: Name of the application; one of this name is replaced.

    Raises:
        InputError: more deployments than segments.
    """

    def __init__(self, engine: FolderEngine, rule: ExitPolicy, replicas: Sequence[int], batch_size: int, limit: int,
                 name: str):
        super().__init__(limit)
        self.engine, self.rule, self.name = engine, rule, f'{name} {socket.gethostname()}'
        segments, deployment = segments_of(rule), None
        last = len(segments)
        if len(replicas) > last:
            raise InputError(f'the policy has {last} segments: give --replicas no more numbers than that')
        for number in reversed(range(len(replicas))):
            first = number * len(segments) // len(replicas)
            deployment = serve.deployment(Segments).options(
                name=f'segments {first + 1} to {last}', num_replicas=replicas[number], max_ongoing_requests=limit,
                graceful_shutdown_wait_loop_s=0.1, ray_actor_options=dict(num_cpus=1),
                logging_config=dict(enable_access_log=False),
            ).bind(engine.folder.resolve(), engine.graphs, rule, segments[first:last], batch_size, deployment)
            last = first
        serve.start(proxy_location='Disabled')
        try:
            self.handle = serve.run(cast(serve.Application, deployment), name=self.name, route_prefix=None)
        except BaseException:
            self.close()
            raise

    async def answer(self, image: np.ndarray) -> Answers:
        """The answer for an image, float32 (C, H, W), normalised."""
        try:
            return await self.handle.remote(Waiting(self.engine.start(image[None])))
        except RayTaskError as error:
            raise error.cause from None

    def close(self) -> None:
        """Ends the deployments."""
        serve.delete(self.name)


def predict_on_ray(
        engine: FolderEngine,
        config: ExitConfig,
        policy: ExitPolicy,
        sources: Sequence[ImageSource],
        output: Path,
        part_size: int,
        batch_size: int,
        cpus: int,
) -> None:
    """`predict.predict` in many processes; all machines have the folders and sources under the same paths.

    Args:
        engine: Engine of the exported folder.
        config: Its exit config.
        policy: When to stop.
        sources: The images.
        output: The folder, held.
        part_size: Images in a part.
        batch_size: Images among which those that go on are regrouped.
        cpus: CPUs of the cluster.

    Raises:
        InputError: as `predict.predict`.
    """
    config = replace(config)  # without what it has solved, which may hold sessions
    total = count_images(sources)
    missing = [k for k in range(math.ceil(total / part_size)) if not part_path(output, k).is_file()]
    runs: List[Tuple[int, int]] = []  # of missing parts: first and count
    for k in missing:
        if runs and k == sum(runs[-1]) and runs[-1][1] < len(missing) / (TASKS_PER_CPU * cpus):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((k, 1))
    folder, graphs, place = engine.folder, engine.graphs, Path.cwd()

    def work(run: Dict[str, int]) -> Dict[str, Any]:
        try:
            os.chdir(place)
            write_parts(_reopened(folder, graphs), config, policy, sources, output, part_size, batch_size, 1,
                        run['first'], run['count'])
        except (InputError, OSError) as error:
            return dict(run, error=str(error))
        return dict(run, error='')

    with tqdm(total=total, initial=total - _images(missing, part_size, total), unit='image', disable=None) as bar:
        if runs:
            rows = [dict(first=first, count=count) for first, count in runs]
            for row in from_items(rows, override_num_blocks=len(rows)).map(work, num_cpus=1).iter_rows():
                if row['error']:
                    raise InputError(row['error'])
                bar.update(_images(range(row['first'], row['first'] + row['count']), part_size, total))
    count_images(sources)  # a folder that changed meanwhile is noticed


def _images(parts: Iterable[int], part_size: int, total: int) -> int:
    return sum(min(part_size, total - k * part_size) for k in parts)
