"""Images of many callers through one network: a queue for each segment, so that those that go on form new batches.

A worker takes what waits at its segment, up to a batch, without waiting for more: alone an image is answered as fast as
without queues, and under load batches grow by themselves.
"""
from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import Any, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np

from ..errors import InputError
from ..stopping.policy import StoppingRule
from .batch_loop import Answers, Segment, segments_of


class QueueFull(InputError):
    """More images wait than are allowed."""


class Waiting(NamedTuple):
    """An image before a segment: a row of the state in which it left the one before."""

    state: Any
    row: int = 0
    memory: Optional[np.ndarray] = None  # the rule's, of this image (1, ...)


def run_segment(
        engine: Any, rule: StoppingRule, segment: Segment, batch: Sequence[Waiting]) -> List[Union[Answers, Waiting]]:
    """Runs images through a segment: the answer of each, of one row, or the image before the next segment.

    Raises:
        InputError: NaN logits.
    """
    first, last = segment
    state = engine.gather([(waiting.state, np.array([waiting.row])) for waiting in batch])
    memories = [waiting.memory for waiting in batch if waiting.memory is not None]
    state, logits = engine.run(first, last, state)
    confidence, leaves, memory = rule.decide(last, logits, np.concatenate(memories) if memories else None)
    found: List[Union[Answers, Waiting]] = []
    for i in range(len(batch)):
        row = slice(i, i + 1)
        if leaves[i]:
            found.append(Answers(np.array([last]), logits[row].argmax(1), np.asarray(confidence[row]), logits[row]))
        else:
            found.append(Waiting(state, i, None if memory is None else memory[row]))
    return found


class Places:
    """Room for a number of images.

    Args:
        limit: Images that `places` admits at once.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.images = 0  # that hold a place
        self._lock = threading.Lock()

    @contextmanager
    def places(self, count: int) -> Iterator[None]:
        """Admits images, all or none, until the block ends; it holds all that takes memory, decoding too.

        Raises:
            QueueFull: with them, more than `limit` images would hold a place.
            InputError: they are more than `limit` alone.
        """
        if count > self.limit:
            raise InputError(f'{count} images at once are more than the queue holds: send at most {self.limit}')
        with self._lock:
            if self.images + count > self.limit:
                raise QueueFull(f'{self.images} images wait: try again later')
            self.images += count
        try:
            yield
        finally:
            with self._lock:
                self.images -= count


_Entry = Tuple[Waiting, Future[Answers]]


class SegmentQueues(Places):
    """Runs images under a stopping rule, in a thread for each segment.

    Args:
        engine: See `engine.Engine`; several of its segments run at once.
        rule: When to stop.
        batch_size: Images that run together at most.
        limit: Images that `places` admits at once.
    """

    def __init__(self, engine: Any, rule: StoppingRule, batch_size: int = 32, limit: int = 1024):
        super().__init__(limit)
        self.engine, self.rule, self.batch_size = engine, rule, batch_size
        self.segments, self._closing = segments_of(rule), False
        engine.build(self.segments)
        self._queues: List[SimpleQueue[Optional[_Entry]]] = [SimpleQueue() for _ in self.segments]
        self._workers = [threading.Thread(target=self._work, args=(i,), daemon=True) for i in range(len(self.segments))]
        for worker in self._workers:
            worker.start()

    def submit(self, image: np.ndarray) -> Future[Answers]:
        """Puts an image in the first queue; see `places`.

        Args:
            image: float32 (C, H, W), normalised.

        Returns:
            The future of its answer, of one row.
        """
        answer: Future[Answers] = Future()
        answer.set_running_or_notify_cancel()  # a caller that cancels must not fail those in its batch
        self._queues[0].put((Waiting(self.engine.start(image[None])), answer))
        return answer

    async def answer(self, image: np.ndarray) -> Answers:
        """`submit`, awaited."""
        return await asyncio.wrap_future(self.submit(image))

    def close(self) -> None:
        """Ends the workers. What waits has no caller any more, and gets an error."""
        self._closing = True
        self._queues[0].put(None)
        for worker in self._workers:
            worker.join()

    def _work(self, number: int) -> None:
        ends = False
        while not ends:
            batch, ends = self._take(self._queues[number])
            if batch:
                try:
                    if self._closing:
                        raise RuntimeError('the server is stopping')
                    self._run(number, batch)
                except BaseException as error:  # an image's caller must not wait for ever
                    for _, answer in batch:
                        if not answer.done():
                            answer.set_exception(error)
        if number + 1 < len(self._queues):
            self._queues[number + 1].put(None)

    def _take(self, queue: SimpleQueue[Optional[_Entry]]) -> Tuple[List[_Entry], bool]:
        """What waits, up to a batch, and whether nothing comes after it."""
        batch: List[_Entry] = []
        try:
            while len(batch) < self.batch_size:
                entry = queue.get(block=not batch)
                if entry is None:
                    return batch, True
                batch.append(entry)
        except Empty:
            pass
        return batch, False

    def _run(self, number: int, batch: List[_Entry]) -> None:
        found = run_segment(self.engine, self.rule, self.segments[number], [waiting for waiting, _ in batch])
        for result, (_, answer) in zip(found, batch):
            if isinstance(result, Answers):
                answer.set_result(result)
            else:
                self._queues[number + 1].put((result, answer))
