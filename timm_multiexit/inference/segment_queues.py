"""Images of many callers through one network: a queue for each segment, so that those that go on form new batches.

A worker takes what waits at its segment, up to a batch, without waiting for more: alone an image is answered as fast as
without queues, and under load batches grow by themselves.
"""
from __future__ import annotations

import threading
from concurrent.futures import Future
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import Any, Iterator, List, NamedTuple, Optional, Tuple

import numpy as np

from ..errors import InputError
from ..stopping.policy import StoppingRule
from .batch_loop import Answers, segments_of


class QueueFull(InputError):
    """More images wait than are allowed."""


class _Waiting(NamedTuple):
    """An image before a segment: a row of the state in which it left the one before."""

    state: Any
    row: int
    memory: Optional[np.ndarray]  # the rule's, of this image (1, ...)
    answer: Future[Answers]


class SegmentQueues:
    """Runs images under a stopping rule, in a thread for each segment.

    Args:
        engine: See `engine.Engine`; several of its segments run at once.
        rule: When to stop.
        batch_size: Images that run together at most.
        limit: Images that `places` admits at once.
    """

    def __init__(self, engine: Any, rule: StoppingRule, batch_size: int = 32, limit: int = 1024):
        self.engine, self.rule, self.batch_size, self.limit = engine, rule, batch_size, limit
        self.segments = segments_of(rule)
        engine.build(self.segments)
        self.images = 0  # that hold a place
        self._lock = threading.Lock()
        self._queues: List[SimpleQueue[Optional[_Waiting]]] = [SimpleQueue() for _ in self.segments]
        self._workers = [threading.Thread(target=self._work, args=(i,), daemon=True) for i in range(len(self.segments))]
        for worker in self._workers:
            worker.start()

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

    def submit(self, image: np.ndarray) -> Future[Answers]:
        """Puts an image in the first queue; see `places`.

        Args:
            image: float32 (C, H, W), normalised.

        Returns:
            The future of its answer, of one row.
        """
        answer: Future[Answers] = Future()
        answer.set_running_or_notify_cancel()  # a caller that cancels must not fail those in its batch
        self._queues[0].put(_Waiting(self.engine.start(image[None]), 0, None, answer))
        return answer

    def close(self) -> None:
        """Answers what waits, and ends the workers."""
        self._queues[0].put(None)
        for worker in self._workers:
            worker.join()

    def _work(self, number: int) -> None:
        ends = False
        while not ends:
            batch, ends = self._take(self._queues[number])
            if batch:
                try:
                    self._run(number, batch)
                except BaseException as error:  # an image's caller must not wait for ever
                    for waiting in batch:
                        if not waiting.answer.done():
                            waiting.answer.set_exception(error)
        if number + 1 < len(self._queues):
            self._queues[number + 1].put(None)

    def _take(self, queue: SimpleQueue[Optional[_Waiting]]) -> Tuple[List[_Waiting], bool]:
        """What waits, up to a batch, and whether nothing comes after it."""
        batch: List[_Waiting] = []
        try:
            while len(batch) < self.batch_size:
                waiting = queue.get(block=not batch)
                if waiting is None:
                    return batch, True
                batch.append(waiting)
        except Empty:
            pass
        return batch, False

    def _run(self, number: int, batch: List[_Waiting]) -> None:
        first, last = self.segments[number]
        state = self.engine.gather([(waiting.state, np.array([waiting.row])) for waiting in batch])
        memories = [waiting.memory for waiting in batch if waiting.memory is not None]
        state, logits = self.engine.run(first, last, state)
        confidence, leaves, memory = self.rule.decide(last, logits, np.concatenate(memories) if memories else None)
        for i, waiting in enumerate(batch):
            row = slice(i, i + 1)
            if leaves[i]:
                waiting.answer.set_result(Answers(
                    np.array([last]), logits[row].argmax(1), np.asarray(confidence[row]), logits[row]))
            else:
                self._queues[number + 1].put(_Waiting(
                    state, i, None if memory is None else memory[row], waiting.answer))
