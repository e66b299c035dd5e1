"""Traces a timm model with torch.fx: its graph, what it holds at two batch sizes, and what it costs node by node."""
import sys
from copy import deepcopy
from typing import Any, Callable, Dict, List, NamedTuple, Set, Tuple

import torch
from timm.layers import DropPath
from timm.models import get_notrace_functions, get_notrace_modules
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ..errors import InputError, first_line

BATCHES = (2, 3)  # two sizes tell what depends on the batch from what does not


class Root(nn.Module):
    """What stages run on: its only module is the backbone, so that names in the graphs are those of the network."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.ends_in_logits = False  # else in what the backbone's own head reads
        self.used: Set[str] = set()  # names of what stages use

    def forward(self, x: torch.Tensor):
        return self.backbone(x) if self.ends_in_logits else self.backbone.forward_features(x)


class _HeadOf(Root):
    def forward(self, x: torch.Tensor):
        return x if self.ends_in_logits else self.backbone.forward_head(x)


class Trace(NamedTuple):
    """A traced backbone.

    Attributes:
        nodes: Its graph in the order in which it runs, from the image to the features.
        outputs: The node that a module, by name, returned last, of several the last tensor.
        shapes: Shape of each tensor at the two batch sizes, and the value of everything else.
        macs: Multiply-adds up to and including each node, for one image.
    """

    nodes: List[fx.Node]
    outputs: Dict[str, fx.Node]
    shapes: Dict[fx.Node, Tuple[Any, Any]]
    macs: Dict[fx.Node, int]

    @property
    def end(self) -> Any:
        """The node of the features or logits."""
        return self.nodes[-1].args[0]

    def shape(self, name: str = '') -> Tuple[int, ...]:
        """Of the output of a module, of the end without a name."""
        return tuple(self.shapes[self.outputs[name] if name else self.end][0])

    def is_batch_first(self, node: Any) -> bool:
        """Whether a node gives a tensor of which rows can be taken image by image."""
        a, b = self.shapes[node] if isinstance(node, fx.Node) else (None, None)
        return (isinstance(a, Shape) and len(a) > 0 and (a[0], b[0]) == BATCHES and a[1:] == b[1:])


class Shape(tuple):
    """The shape of a tensor; a torch.Size in the graph stays a plain tuple."""


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # what is computed from a buffer follows it to another device

    def __init__(self, backbone: nn.Module):
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        # torch looks for these functions where a forward is defined; forward_features may be elsewhere.
        self._autowrap_search += [sys.modules[cls.__module__] for cls in type(backbone).__mro__]
        self.leaves = (*get_notrace_modules(), DropPath)
        self.outputs: Dict[str, List[fx.Node]] = {}
        self.last = ''  # the module that it is in

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self.leaves) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable, args: Tuple, kwargs: Dict[str, Any]) -> Any:
        self.last = self.path_of_module(m)
        out = super().call_module(m, forward, args, kwargs)
        made = [x.node for x in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(x, fx.Proxy)]
        if made:
            self.outputs[self.path_of_module(m).removeprefix('backbone.')] = made
        return out


class _Counter(TorchDispatchMode):
    """Counts multiply-adds, as torch's FlopCounterMode does at several times the cost."""

    macs = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func._overloadpacket):
            self.macs += count(*args, **(kwargs or {}), out_val=out) // 2
        return out


class _Probe(fx.Interpreter):
    """Runs a graph on tensors without data, and notes shapes and multiply-adds."""

    def __init__(self, root: nn.Module, graph: fx.Graph):
        super().__init__(root, graph=graph)
        self.counter, self.seen, self.macs = _Counter(), {}, {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.seen[n] = _describe(value)
        self.macs[n] = self.counter.macs
        return value

    def probe(self, *size: int) -> None:
        dtype = next(self.module.parameters()).dtype
        with torch.no_grad(), torch.device('meta'), self.counter:
            self.run(torch.empty(*size, dtype=dtype))


def _without_data(root: Root) -> Root:
    """A copy on PyTorch's meta device, made without copying any data."""
    return deepcopy(root, {id(t): nn.Parameter(t.to('meta'), t.requires_grad) if isinstance(t, nn.Parameter)
                           else t.to('meta') for t in (*root.parameters(), *root.buffers())})


def _describe(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return Shape(value.shape)
    return tuple(map(_describe, value)) if isinstance(value, (list, tuple)) else value


def _keep_constants(root: Root, graph: fx.Graph) -> None:
    """Makes tensors that the tracer computed buffers of the backbone, which move with it; they are not saved."""
    for node in graph.nodes:
        if node.op == 'get_attr' and not str(node.target).startswith('backbone.'):
            name, value = f'traced{sum(1 for _ in root.buffers())}', getattr(root, node.target)
            root.backbone.register_buffer(name, value, persistent=False)
            node.target = f'backbone.{name}'


def trace(root: Root, image_size: Tuple[int, int, int]) -> Tuple[Trace, Trace]:
    """Traces a backbone in eval and in train mode. Dropout and stochastic depth stay modules, which follow their mode.

    Args:
        root: Holds the backbone; modes are left as they were.
        image_size: (C, H, W).

    Raises:
        InputError: it cannot be traced, or does not run on images of that size.
    """
    modes = {module: module.training for module in root.modules()}
    traces: List[Trace] = []
    try:
        for training in (False, True):
            tracer = _Tracer(root.backbone)
            graph = tracer.trace(root.train(training))
            _keep_constants(root, graph)
            if traces and str(graph) == str(traces[0].nodes[0].graph):
                traces.append(traces[0])  # as most are
                break
            probes = [_Probe(_without_data(root), graph) for _ in BATCHES]
            for batch, probe in zip(BATCHES, probes):
                probe.probe(batch, *image_size)
            shapes = {node: tuple(probe.seen[node] for probe in probes) for node in graph.nodes}
            macs = {node: count // BATCHES[0] for node, count in probes[0].macs.items()}
            # Beside its map a block may return the size of it.
            outputs = {name: next((node for node in made[::-1] if isinstance(shapes[node][0], Shape)), made[-1])
                       for name, made in tracer.outputs.items()}
            traces.append(Trace(list(graph.nodes), outputs, shapes, macs))
    except Exception as error:  # whatever the model's own code raises on a proxy or a size
        reason = first_line(error)
        raise InputError(
            f'{type(root.backbone).__name__} cannot be cut into stages for images of size {tuple(image_size)}, in '
            f'{tracer.last or "forward"} ({reason}): choose another backbone or image size') from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    return traces[0], traces[1]


def trace_head(root: Root) -> fx.GraphModule:
    """The backbone's own head, traced, for TorchScript."""
    head = _HeadOf(root.backbone)
    head.ends_in_logits = root.ends_in_logits
    graph = _Tracer(root.backbone).trace(head)
    return fx.GraphModule(root, graph)
