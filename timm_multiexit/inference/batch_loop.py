"""Early exit in a batch: images that are done leave, and later stages run on the others.

chunk -> segment up to the first exit in use -> images leave -> chunks are regrouped -> next segment -> ...

Arrays are NumPy's: nothing here knows PyTorch, so that a device without it runs this very file.
"""
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from ..stopping.policy import StoppingRule

# Compacting copies the state of the images that stay, at about 3 % of the cost of running the others on.
COMPACT_BELOW = 0.95

Segment = Tuple[int, int]


class Answers(NamedTuple):
    """The answers for a batch, in input order.

    Attributes:
        exit_index: Exit that answered, int64 (N,).
        prediction: Its class, int64 (N,).
        confidence: Its confidence, float32 (N,).
        logits: Its logits, float32 (N, num_classes).
    """

    exit_index: np.ndarray
    prediction: np.ndarray
    confidence: np.ndarray
    logits: np.ndarray


class _Chunk(NamedTuple):
    """Images that run together."""

    state: Any  # the engine's, of all rows
    owners: np.ndarray  # position in the batch of each row's image, -1 where it has left
    memory: Optional[np.ndarray]  # the rule's, of all rows, or None


def segments_of(rule: StoppingRule) -> Tuple[Segment, ...]:
    """Runs of stages (first, last) between the exits that a rule uses."""
    used = rule.exits_in_use
    return tuple(zip((0, *(k + 1 for k in used)), used))


def run_one(engine, rule: StoppingRule, segments: Sequence[Segment], image: Any) -> Answers:
    """Runs a single image (1, C, H, W): nothing is regrouped, and what `run_batch` costs around it would be felt."""
    state, memory = engine.start(image), None
    for first, k in segments:
        state, logits = engine.run(first, k, state)
        confidence, leaves, memory = rule.decide(k, logits, memory)
        if leaves[0]:
            break
    return Answers(np.array([k]), logits.argmax(1), confidence, logits)


def run_batch(engine, rule: StoppingRule, segments: Sequence[Segment], images: Any, chunk_size: int) -> Answers:
    """Runs a batch.

    Args:
        engine: See `engine.Engine`.
        rule: When to stop.
        segments: `segments_of` the rule.
        images: (N, C, H, W), as the engine takes them, N > 0.
        chunk_size: Images that run together.

    Raises:
        InputError: NaN logits.
    """
    size = len(images)
    answers = Answers(
        np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.float32),
        np.empty((size, engine.num_classes), np.float32))
    chunks = [
        _Chunk(engine.start(images[i:i + chunk_size]), np.arange(i, min(i + chunk_size, size)), None)
        for i in range(0, size, chunk_size)]
    for first, k in segments:
        staying = []
        for state, owners, memory in chunks:
            state, logits = engine.run(first, k, state)
            decision = rule.decide(k, logits, memory)
            leaves = decision.leaves & (owners >= 0)
            gone = owners[leaves]
            answers.exit_index[gone] = k
            answers.prediction[gone] = logits[leaves].argmax(1)
            answers.confidence[gone] = decision.confidence[leaves]
            answers.logits[gone] = logits[leaves]
            owners = np.where(leaves, -1, owners)
            if (owners >= 0).any():
                staying.append(_Chunk(state, owners, decision.memory))
        chunks = _regroup(engine, staying, chunk_size)
        if not chunks:
            break
    return answers


def _regroup(engine, chunks: Sequence[_Chunk], chunk_size: int) -> List[_Chunk]:
    """Chunks for the next segment: neighbours that fit into one are joined, and images that left are dropped."""
    groups: List[List[_Chunk]] = []
    filled = 0
    for chunk in chunks:
        count = int((chunk.owners >= 0).sum())
        if groups and filled + count <= chunk_size:
            groups[-1].append(chunk)
            filled += count
        else:
            groups.append([chunk])
            filled = count
    return [_join(engine, group) for group in groups]


def _join(engine, group: Sequence[_Chunk]) -> _Chunk:
    rows = [np.flatnonzero(chunk.owners >= 0) for chunk in group]
    first = group[0]
    if len(group) == 1 and len(rows[0]) > COMPACT_BELOW * len(first.owners):
        return first
    state = engine.gather([
        (chunk.state, None if len(r) == len(chunk.owners) else r) for chunk, r in zip(group, rows)])
    owners = np.concatenate([chunk.owners[r] for chunk, r in zip(group, rows)])
    memories = [chunk.memory[r] for chunk, r in zip(group, rows) if chunk.memory is not None]
    return _Chunk(state, owners, np.concatenate(memories) if memories else None)


def gather_arrays(pieces: Sequence[Tuple[List[np.ndarray], Optional[np.ndarray]]]) -> List[np.ndarray]:
    """`engine.Engine.gather` for states that are lists of arrays."""
    sizes = [len(state[0]) if rows is None else len(rows) for state, rows in pieces]
    if len(pieces) == 1 and pieces[0][1] is None:
        return pieces[0][0]
    gathered = []
    for parts in zip(*(state for state, _ in pieces)):
        out = np.empty((sum(sizes), *parts[0].shape[1:]), parts[0].dtype)
        start = 0
        for size, x, (_, rows) in zip(sizes, parts, pieces):
            if rows is None:
                out[start:start + size] = x
            else:
                np.take(x, rows, 0, out=out[start:start + size], mode='clip')  # 'raise' would buffer
            start += size
        gathered.append(out)
    return gathered
