"""Static int8 quantisation of an exported folder, and the scores of the network that it makes.

Each stage and each head is quantised on the states that held-out images give it in the float network. The answers then
differ in the last bits that thresholds are compared with, so temperatures and scores are computed anew, from images
that set no range.
"""
import hashlib
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple, Union

import numpy as np
import onnx
import torch
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from tqdm import tqdm

from ..datasets import normalize
from ..files import read_json, replaced, write_json
from ..models import MultiExitNet
from ..stopping.config import ExitConfig
from .device import GRAPHS_NAME, FolderEngine, all_logits
from .export import IR_VERSION, add_runner, write_graphs
from .profile import take_turns

RANGE_IMAGES = 256  # that set the ranges of activations
# A range is the mean over batches of the extremes in each: single outliers would coarsen the steps of all values.
_RANGE_BATCH = 16
# Convolutions at the start that stay in float: their rounding reaches everything after. For MSFuse they are 4 % of the
# MACs; with them in int8, 1.45 times as many answers differ from the float network's, and exits lose up to 1.1 points.
_FLOAT_CONVOLUTIONS = 4
_SECONDS = 6.  # to spend on the time of a batch size
_ROUNDS = (3, 50)

Batches = Iterable[Tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class HeldOut:
    """Images that the network was not trained on: batches uint8 (B, C, H, W) with labels int64 (B,).

    Attributes:
        ranges: Set the ranges of activations.
        scores: Scores and temperatures come from these.
        certification: Kept for guarantees; None for none.
    """

    ranges: Batches
    scores: Batches
    certification: Optional[Batches] = None


@dataclass(frozen=True)
class Int8Report:
    """What quantisation changed.

    Attributes:
        graphs: The files.
        images: On which accuracy was measured, those of the scores.
        accuracies: Per exit, in percent, of (float32, int8).
        times: By batch size, milliseconds per image from the first stage to the last exit, medians, of (float32, int8).
    """

    graphs: List[Path]
    images: int
    accuracies: List[Tuple[float, float]]
    times: Dict[int, Tuple[float, float]]


class _Feeds(CalibrationDataReader):
    """What a graph reads, by name, batch by batch."""

    def __init__(self, feeds: Iterable[Dict[str, np.ndarray]]):
        self.feeds = iter(feeds)

    def get_next(self) -> Any:
        return next(self.feeds, None)


def export_int8_folder(
        model: MultiExitNet,
        config: ExitConfig,
        folder: Union[str, Path],
        images: HeldOut,
        vnni: bool = False,
        batch_sizes: Sequence[int] = (1, 256),
) -> Int8Report:
    """As `export.export_folder`, with graphs in int8.

    Args:
        model: The network, in eval mode, with its record.
        config: Its exit config, of which costs, class names and confidence measure are kept.
        folder: Where to write; an earlier export there is replaced, anything else is refused.
        images: Held out in training.
        vnni: Weights of 8 bits, for processors that multiply and add bytes in one instruction (x86 with VNNI, ARM with
            dot products). On others their sums of two products exceed 16 bits, so weights have 7 bits by default.
        batch_sizes: Whose time is measured.

    Raises:
        InputError: as `export_folder`, or no images.
    """
    with replaced(folder, GRAPHS_NAME) as made:
        plain = made.with_name('float32')
        plain.mkdir()
        names = write_graphs(model, plain)
        before = FolderEngine(plain)
        how = before.graphs['preprocessing']

        def prepared(batches: Batches) -> Iterable[Tuple[np.ndarray, np.ndarray]]:
            for x, y in batches:
                yield normalize(x, how['mean'], how['std']).numpy(), y.numpy()

        quantize_folder(before, np.concatenate([x for x, _ in prepared(images.ranges)]), made, vnni)
        after = FolderEngine(made)
        logits: List[np.ndarray] = []
        labels: List[np.ndarray] = []
        certification: List[np.ndarray] = []
        correct = np.zeros((2, after.num_exits))
        for kept, batches in enumerate((images.scores, images.certification or ())):
            for x, y in prepared(batches):
                logits.append(all_logits(after, x))
                labels.append(y)
                certification.append(np.full(len(y), bool(kept)))
                if not kept:
                    for i, answers in enumerate((all_logits(before, x), logits[-1])):
                        correct[i] += (answers.argmax(2) == y).sum(1)
        of_graphs = hashlib.sha256(''.join(after.graphs['sha256'].values()).encode()).hexdigest()
        add_runner(made, ExitConfig.fit(
            list(np.concatenate(logits, 1)), np.concatenate(labels), config.costs, config.class_names, config.measure,
            np.concatenate(certification), of_graphs))
        count = int((~np.concatenate(certification)).sum())
        times = {size: _times(before, after, size) for size in batch_sizes}
    return Int8Report([Path(folder) / name for name in names], count,
                      [(a, b) for a, b in (100. * correct / count).T.tolist()], times)


def quantize_folder(engine: FolderEngine, images: np.ndarray, folder: Path, vnni: bool) -> None:
    """Writes the graphs of a folder in int8 into another, and their list.

    Args:
        engine: Engine of the float folder.
        images: float32 (N, C, H, W), normalised.
        folder: Where to write.
        vnni: See `export_int8_folder`.
    """
    states = [engine.start(images[i:i + _RANGE_BATCH]) for i in range(0, len(images), _RANGE_BATCH)]
    digests = {}
    with tqdm(total=2 * engine.num_exits, desc='int8', unit='graph', leave=False, disable=None) as progress:
        for k, (read, made) in enumerate(zip(engine.states, engine.states[1:])):
            after = [engine.run(k, k, state)[0] for state in states]
            for name, names, batches in ((f'stage_{k + 1}.onnx', read, states), (f'head_{k + 1}.onnx', made, after)):
                feeds = [dict(zip(names, state)) for state in batches]
                in_float = 0 if k or batches is after else _FLOAT_CONVOLUTIONS
                data = _quantized(engine.folder / name, feeds, vnni, in_float)
                (folder / name).write_bytes(data)
                digests[name] = hashlib.sha256(data).hexdigest()
                progress.update()
            states = after
    graphs = read_json(engine.folder / GRAPHS_NAME, 'list of graphs')
    write_json(folder / GRAPHS_NAME, {**graphs, 'precision': 'int8 vnni' if vnni else 'int8', 'sha256': digests})


def _quantized(path: Path, feeds: Sequence[Dict[str, np.ndarray]], vnni: bool, in_float: int) -> bytes:
    """A graph in int8, but for its first `in_float` convolutions and normalisations that no convolution precedes."""
    graph = onnx.load(path).graph
    normalisations = [node.name for node in graph.node if node.op_type.endswith('Normalization')]
    convolutions = [node.name for node in graph.node if node.op_type == 'Conv']
    with tempfile.TemporaryDirectory() as scratch:
        prepared, quantized = (Path(scratch) / name for name in ('prepared.onnx', 'int8.onnx'))
        # Batch normalisation is folded at export: shapes are all that is to be prepared.
        quant_pre_process(str(path), str(prepared), skip_optimization=True, skip_symbolic_shape=True)
        quantize_static(
            str(prepared), str(quantized), _Feeds({v.name: maps[v.name] for v in graph.input} for maps in feeds),
            quant_format=QuantFormat.QDQ, per_channel=True, reduce_range=not vnni, activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8, nodes_to_exclude=convolutions[:in_float] + normalisations,
            calibrate_method=CalibrationMethod.MinMax, extra_options=dict(CalibMovingAverage=True))
        result = onnx.load(quantized)
    del result.graph.value_info[:]  # inferred when the graph is loaded
    kept = {value.name for value in (*graph.input, *graph.output)} | {''}
    short: Dict[str, str] = {}  # long names stand at every use, up to a tenth of a file
    for node in result.graph.node:
        node.name = ''
        for names in (node.input, node.output):
            names[:] = [name if name in kept else short.setdefault(name, f'_{len(short)}') for name in names]
    for value in result.graph.initializer:
        value.name = short.get(value.name, value.name)
    result.ir_version = IR_VERSION
    return result.SerializeToString()


def _times(before: FolderEngine, after: FolderEngine, size: int) -> Tuple[float, float]:
    """Milliseconds per image to the last exit, of both in turns."""
    images = np.random.default_rng(0).normal(size=(size, *before.graphs['preprocessing']['input_size']))
    tasks = {engine: lambda e=engine: e.run(0, e.num_exits - 1, e.start(images)) for engine in (before, after)}
    start = time.perf_counter()
    tasks[before]()
    once = 2 * (time.perf_counter() - start)
    rounds = int(min(max(_SECONDS / once, _ROUNDS[0]), _ROUNDS[1]))
    times = take_turns(tasks, rounds, torch.device('cpu'), f'time of batches of {size}')
    float32, int8 = (1e3 * statistics.median(times[engine]) / size for engine in (before, after))
    return float32, int8
