"""Answers to millions of images as a folder of Parquet files: streamed, in bounded memory, resumable after a kill.

A source has an order, and each file (a part) holds the answers for a fixed range of it. Parts are written beside and
renamed, so those that are there are whole, and a rerun skips their images.
"""
import dataclasses
import hashlib
import itertools
import json
import sys
import warnings
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, Callable, Deque, Dict, Generator, Iterator, List, Optional, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from ..errors import InputError, UnreachableError
from ..files import read_json, sha256, write_json, written_beside
from ..stopping.config import FILE_NAME, SCORES_NAME, ExitConfig
from ..stopping.costs import format_macs
from ..stopping.policy import ExitPolicy
from .batch_loop import segments_of
from .device import GRAPHS_NAME, FolderEngine, answer_images
from .runner import CHUNK_SIZE
from .sources import ImageSource, Item, read_images

# Readers of Parquet folders pass over names that start with an underscore or a dot.
RECORD_NAME = '_predict.json'
SCHEMA = pa.schema(dict(
    path=pa.string(), label=pa.int32(), class_name=pa.string(), confidence=pa.float32(), exit=pa.int32(),
    macs=pa.int64(), error=pa.string()))


def policy_on_record(
        output: Path,
        engine: FolderEngine,
        sources: Sequence[ImageSource],
        stop: Dict[str, Any],
        part_size: int,
        solve: Callable[[], ExitPolicy],
) -> ExitPolicy:
    """The policy that the parts of a folder are made with; of a new one, it is solved and recorded with the rest.

    A policy for a time on this machine is solved by trying it: solved again, it would be another.

    Args:
        output: The folder, held.
        engine: Engine of the exported folder.
        sources: The images.
        stop: The options that ask for a policy.
        part_size: Images in a part.
        solve: Gives the policy.

    Raises:
        InputError: the folder holds something else, as parts made of other things.
    """
    files = [path for name in (GRAPHS_NAME, FILE_NAME, SCORES_NAME) if (path := engine.folder / name).is_file()]
    network = hashlib.sha256(''.join(map(sha256, files)).encode()).hexdigest()
    made_of: Dict[str, Any] = dict(
        network=network, stop=stop, part_size=part_size, sources=[source.record for source in sources])
    path = output / RECORD_NAME
    if not path.exists():
        policy = solve()
        write_json(path, dict(**made_of, policy=dataclasses.asdict(policy)))
        return policy
    record = read_json(path, 'record')
    try:
        for name, now in made_of.items():
            if (before := record[name]) != now:
                if name == 'sources':
                    before, now = next((a, b) for a, b in itertools.zip_longest(before, now) if a != b)
                raise InputError(f"'{output}' was begun with other input ({name} {json.dumps(before)}, now "
                                 f'{json.dumps(now)}): choose another --output, or delete it')
        return ExitPolicy(**record['policy'])
    except (KeyError, TypeError) as error:
        raise InputError(f"'{path}' is not a record of predict ({error!r}): choose another --output, or delete it"
                         ) from error


def check_output(output: Path) -> None:
    """Checks that a folder is new, empty, or one of parts.

    Raises:
        InputError: it holds something else.
    """
    if output.is_dir() and not (output / RECORD_NAME).exists():
        # A kill before the record was written leaves these.
        others = [path.name for path in output.iterdir() if not path.name.lstrip('.').startswith(('lock', '_predict'))]
        if others:
            raise InputError(
                f"'{output}' holds something other than predictions ('{others[0]}'): give another --output")


def predict(
        engine: FolderEngine,
        config: ExitConfig,
        policy: ExitPolicy,
        sources: Sequence[ImageSource],
        output: Path,
        part_size: int = 10_000,
        batch_size: int = 64,
        workers: int = 1,
) -> None:
    """Writes the parts that are missing, `part-00000.parquet` and so on, with the columns of `SCHEMA`.

    An image that cannot be read has a row with its `error` and its path alone; a disk that fails ends the run. Labels
    count from 0, exits from 1.

    Args:
        engine: Engine of the exported folder.
        config: Its exit config.
        policy: When to stop.
        sources: The images.
        output: The folder, held.
        part_size: Images in a part.
        batch_size: Images among which those that go on are regrouped.
        workers: Threads, each with a batch of its own.

    Raises:
        InputError: sources that changed or cannot be read any more, NaN logits, or no space left.
    """
    first = next(k for k in itertools.count() if not part_path(output, k).is_file())
    if first:
        print(f"note: resumes in '{output}', which has {first} parts of {part_size:,} images", file=sys.stderr)
    skip = first * part_size
    counts = [source.images for source in sources if source.images is not None]
    total = sum(counts) if len(counts) == len(sources) else None
    with tqdm(total=total, initial=skip if total is None else min(skip, total), unit='image', disable=None) as bar:
        write_parts(engine, config, policy, sources, output, part_size, batch_size, workers, first, None, bar.update)


def write_parts(
        engine: FolderEngine,
        config: ExitConfig,
        policy: ExitPolicy,
        sources: Sequence[ImageSource],
        output: Path,
        part_size: int,
        batch_size: int,
        workers: int,
        first: int,
        count: Optional[int],
        tell: Callable[[], Any] = lambda: None,
) -> None:
    """Writes parts that follow one another, as far as there are images; see `predict`.

    Args:
        first: The number of the first part.
        count: How many; None for all.
        tell: Called after each image.
    """
    engine.build(segments_of(policy))
    names = config.names_of(engine.num_classes)

    def rows(items: Sequence[Item]) -> List[Dict[str, Any]]:
        answers = iter(answer_images(
            engine, policy, [item.image for item in items if not isinstance(item.image, InputError)], CHUNK_SIZE))
        made = []
        for path, image in items:
            answer = image if isinstance(image, InputError) else next(answers)
            row = dict(path=path.encode('utf-8', 'backslashreplace').decode())  # names of files may be no UTF-8
            if isinstance(answer, UnreachableError):
                raise InputError(f'{answer}, and run the same command again')
            if isinstance(answer, InputError):
                made.append(dict(row, error=str(answer).encode('utf-8', 'backslashreplace').decode()))
            else:
                k, label, confidence, _ = answer
                made.append(dict(row, label=label, class_name=names[label], confidence=confidence, exit=k + 1,
                                 macs=config.exit_macs[k]))
        return made

    images = read_images(sources, first * part_size)
    answered = _mapped(rows, itertools.islice(images, count and count * part_size), batch_size, workers)
    with warnings.catch_warnings(), closing(answered):
        warnings.simplefilter('ignore')  # the reader does so too, but threads share the filters
        for k in itertools.islice(itertools.count(first), count):
            part = []
            while len(part) < part_size and (row := next(answered, None)):
                part.append(row)
                tell()
            if not part:
                break
            with written_beside(part_path(output, k)) as partial:
                pq.write_table(pa.Table.from_pylist(part, SCHEMA), partial)


def part_path(output: Path, number: int) -> Path:
    """The file of a part."""
    return output / f'part-{number:05}.parquet'


def _mapped(
        rows: Callable[[Sequence[Item]], List[Dict[str, Any]]],
        items: Iterator[Item],
        batch_size: int,
        workers: int,
) -> Generator[Dict[str, Any], None, None]:
    """Rows of all items in order; a batch for each worker at a time, and one waiting."""
    waiting: Deque[Future] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        while batch := list(itertools.islice(items, batch_size)):
            waiting.append(pool.submit(rows, batch))
            if len(waiting) > workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def summary(output: Path) -> str:
    """What all parts of a folder hold, in words."""
    images = errors = macs = 0
    parts = sorted(output.glob('part-*.parquet'))
    for path in parts:
        with pq.ParquetFile(path) as file:
            column = file.read(['macs']).column(0)
        images += len(column)
        errors += column.null_count
        macs += sum(filter(None, column.to_pylist()))
    average = f', {format_macs(macs / (images - errors))} MACs per image' if images > errors else ''
    unread = f', {errors:,} of them with an error' if errors else ''
    return f'{images:,} images in {len(parts):,} {"part" if len(parts) == 1 else "parts"}{unread}{average}'
