"""The onnxruntime engine: on a CPU several times faster than PyTorch, above all for single images.

An image's logits do not depend on the rest of its batch, to the last bit (tests/inference/test_runner.py checks it):
onnxruntime's convolutions sum each output element in one order. PyTorch's choose an algorithm by the batch size.
"""
import threading
import warnings
from typing import Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..models import MultiExitNet
from ..models._fold import fold
from .batch_loop import gather_arrays

State = List[np.ndarray]


class _AllStates(nn.Module):
    """Every state and every exit's logits as outputs, so that any segment can be cut out of one graph."""

    def __init__(self, model: MultiExitNet):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor):
        state = [images]
        outputs = []
        for stage, head in zip(self.model.stages, self.model.exits):
            state = stage(state)
            outputs += [*state, head(state[-1])]
        return tuple(outputs)


class OnnxEngine:
    """Runs segments with onnxruntime, on the CPU, in float32; see `engine.Engine`.

    Each operation runs in the thread that calls it. Several threads may call at once, each with its own images: that
    uses the cores better than splitting every small operation between them.

    Args:
        model: The network; it is copied.
        threads: How many threads should call at once; None for as many as PyTorch uses.
    """

    name = 'onnx'

    def __init__(self, model: MultiExitNet, threads: Optional[int] = None):
        self.num_exits, self.num_classes, self.in_chans = model.num_exits, model.num_classes, model.in_chans
        self.device, self.dtype = torch.device('cpu'), torch.float32
        self.workers = threads or torch.get_num_threads()
        height, width = model.pretrained_cfg['input_size'][1:]
        self.image_size: Optional[Tuple[int, int]] = (height, width)
        names, graph = export_graph(model, (height, width))
        self.state_names = [*names[:-1], []]  # nothing goes on from the last stage
        self.extractor = onnx.utils.Extractor(graph)
        self.sessions: Dict[Tuple[int, int], Tuple[onnxruntime.InferenceSession, List[str]]] = {}
        self.lock = threading.Lock()

    def build(self, segments: Sequence[Tuple[int, int]]) -> None:
        with self.lock:
            for segment in segments:
                if segment not in self.sessions:
                    self.sessions[segment] = self._session(*segment)

    def _session(self, first: int, last: int) -> Tuple[onnxruntime.InferenceSession, List[str]]:
        """A session for a segment, and the names of the maps that it makes; it gives the logits before them."""
        made = maps_made(self.state_names, first, last)
        graph = cut(self.extractor, self.state_names[0][0], self.state_names[first], [f'logits{last}', *made])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            graph.SerializeToString(), options, providers=['CPUExecutionProvider'])
        return session, made

    def start(self, images: Union[torch.Tensor, np.ndarray]) -> State:
        if isinstance(images, torch.Tensor):
            images = images.to('cpu', torch.float32).numpy()
        return [np.ascontiguousarray(images, np.float32)]

    def run(self, first: int, last: int, state: State) -> Tuple[State, np.ndarray]:
        if (first, last) not in self.sessions:
            self.build([(first, last)])
        session, made = self.sessions[first, last]
        maps = dict(zip(self.state_names[first], state))
        logits, *new = map(np.asarray, session.run(None, maps))
        maps.update(zip(made, new))
        return [maps[name] for name in self.state_names[last + 1]], logits

    def gather(self, pieces: Sequence[Tuple[State, Optional[np.ndarray]]]) -> State:
        return gather_arrays(pieces)


def export_graph(model: MultiExitNet, image_size: Tuple[int, int]) -> Tuple[List[List[str]], onnx.ModelProto]:
    """The folded network as one graph.

    Returns:
        Names of the maps that each stage reads, with those that the last one makes, and the graph. A map that a stage
        passes on unchanged keeps its name; each head reads the last map after its stage.
    """
    net = _AllStates(fold(model).cpu().float().to(memory_format=torch.contiguous_format))
    images = torch.zeros(2, model.in_chans, *image_size)
    with torch.no_grad():
        states = [[images]]
        for stage in net.model.stages:
            states.append(stage(states[-1]))
        names = [[f'state{k}_{j}' for j in range(len(state))] for k, state in enumerate(states)]
        outputs = [name for k in range(model.num_exits) for name in (*names[k + 1], f'logits{k}')]
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # torch.onnx of its own internals
            program = torch.onnx.export(
                _exported(net.eval(), images), dynamo=True, verbose=False, input_names=names[0], output_names=outputs)
    assert program is not None  # it is with dynamo=True
    graph = program.model_proto.graph
    # The exporter writes a map that is passed on as Identity of the earlier one, which later nodes still read.
    source: Dict[str, str] = {}
    for node in graph.node:  # in the order in which they run
        del node.metadata_props[:]  # where each line stands on this machine
        node.input[:] = [source.get(name, name) for name in node.input]
        if node.op_type == 'Identity':
            source[node.output[0]] = node.input[0]
    given = iter([source.get(value.name, value.name) for value in graph.output])  # older exporters rename such maps
    read = [names[0]]
    for state in names[1:]:
        read.append([next(given) for _ in state])
        next(given)  # the logits
    return read, program.model_proto


def _exported(net: nn.Module, images: torch.Tensor) -> torch.export.ExportedProgram:
    """As torch.export writes it, with attention as torch.onnx takes it: over four dimensions, else in its parts."""
    program = torch.export.export(net, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False)
    attention = torch.ops.aten.scaled_dot_product_attention.default
    if any(node.target is attention and node.args[0].meta['val'].ndim != 4 for node in program.graph.nodes):
        with sdpa_kernel(SDPBackend.MATH):
            program = program.run_decompositions()
    return program


def maps_made(states: Sequence[Sequence[str]], first: int, last: int) -> List[str]:
    """Names of the maps that a segment makes, without those that it passes on."""
    return [name for name in states[last + 1] if name not in states[first]]


def cut(extractor: onnx.utils.Extractor, images: str, inputs: Sequence[str], outputs: Sequence[str]) -> onnx.ModelProto:
    """The part of the graph between some maps; `images` is the name of the network's input."""
    part = extractor.extract_model(list(inputs), list(outputs))
    for node in part.graph.node:  # older exporters read the batch size off the images, at every head
        if node.op_type == 'Shape' and node.input[0] == images:
            node.input[0] = inputs[0]
    return part
