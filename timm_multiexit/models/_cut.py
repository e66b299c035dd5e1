"""Cuts a timm model into stages: torch.fx traces it, and its graph is split where the exits go.

What is alive at a cut is the state, a list of tensors whose first dimension is the batch. Everything else that crosses
one is rebuilt in the stage that reads it: constants of the weights (position tables, class tokens) are computed again,
the batch size is read off the state, and other sizes are written into the stage, which then takes one image size only.
"""
import operator
import sys
from copy import deepcopy
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

import torch
from timm.layers import DropPath
from timm.models import get_notrace_functions, get_notrace_modules
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ..errors import InputError
from ._base import Stage

_BATCHES = (2, 3)  # two sizes tell what depends on the batch from what does not
_BATCH = object()  # stands for the batch size
_UNKNOWN = object()


class Root(nn.Module):
    """What stages run on: its only module is the backbone, so that names in the graphs are those of the network."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.ends_in_logits = False  # else in what the backbone's own head reads

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
        return (isinstance(a, _Shape) and len(a) > 0 and (a[0], b[0]) == _BATCHES and a[1:] == b[1:])


class _Shape(tuple):
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
        return _Shape(value.shape)
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
    tracer = _Tracer(root.backbone)
    try:
        for training in (False, True):
            tracer = _Tracer(root.backbone)
            graph = tracer.trace(root.train(training))
            _keep_constants(root, graph)
            if traces and str(graph) == str(traces[0].nodes[0].graph):
                traces.append(traces[0])  # as most are
                break
            probes = [_Probe(_without_data(root), graph) for _ in _BATCHES]
            for batch, probe in zip(_BATCHES, probes):
                probe.probe(batch, *image_size)
            shapes = {node: tuple(probe.seen[node] for probe in probes) for node in graph.nodes}
            macs = {node: count // _BATCHES[0] for node, count in probes[0].macs.items()}
            # Beside its map a block may return the size of it.
            outputs = {name: next((node for node in made[::-1] if isinstance(shapes[node][0], _Shape)), made[-1])
                       for name, made in tracer.outputs.items()}
            traces.append(Trace(list(graph.nodes), outputs, shapes, macs))
    except Exception as error:  # whatever the model's own code raises on a proxy or a size
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(
            f'{type(root.backbone).__name__} cannot be cut into stages for images of size {tuple(image_size)}, in '
            f'{tracer.last or "forward"} ({reason}): choose another backbone or image size') from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    return traces[0], traces[1]


class _Segment:
    """The part of a graph that one stage runs: what it needs for the nodes `wanted`, from what is alive at its start.

    Attributes:
        inputs: Tensors that it reads from the state.
        emit: Nodes that it runs, those of earlier stages included that it computes again.
        literals: Values of earlier stages that are no tensors.
        sized: Whether such a value depends on the size of the image.
    """

    def __init__(self, whole: Trace, place: Dict[fx.Node, int], varying: Set[fx.Node], start: int, end: int,
                 wanted: Sequence[fx.Node]):
        self.whole, self.place, self.varying, self.start = whole, place, varying, start
        self.inputs: Set[fx.Node] = set()
        self.emit: Set[fx.Node] = set()
        self.literals: Dict[fx.Node, Any] = {}
        self.sized = False
        changes = [n for n in whole.nodes if start < place[n] <= end and _has_effect(n)]
        pending = [*wanted, *changes]
        while pending:
            node = pending.pop()
            if node not in self.emit and not self._from_state(node):
                self.emit.add(node)
                pending += node.all_input_nodes

    def _from_state(self, node: fx.Node) -> bool:
        """Whether the stage gets a node's value without computing it."""
        if node.op == 'placeholder' or node in self.inputs or node in self.literals:
            self.inputs |= {node} - self.literals.keys()
            return True
        if self.place[node] > self.start or node not in self.varying:
            return False
        if self.whole.is_batch_first(node):
            self.inputs.add(node)
            return True
        a, b = self.whole.shapes[node]
        literal = _literal(a, b)
        if literal is _UNKNOWN:
            return False
        self.literals[node] = literal
        self.sized |= not isinstance(literal, (torch.dtype, torch.device, type(None), bool)) and literal is not _BATCH
        return True

    def graph(self, state: Sequence[fx.Node], wanted: Sequence[fx.Node]) -> fx.Graph:
        """A graph from the state, a list of tensors, to the next one."""
        graph = fx.Graph()
        given = graph.placeholder('state', type_expr=List[torch.Tensor])
        env: Dict[fx.Node, Any] = {}
        for i, node in enumerate(state):
            if node in self.inputs or node in wanted or i == 0:
                env[node] = graph.call_function(operator.getitem, (given, i))
        first = env[state[0]]
        for node, literal in self.literals.items():
            if isinstance(literal, (torch.dtype, torch.device)):  # these change with `model.to`
                env[node] = graph.call_function(getattr, (first, type(literal).__name__))
            else:
                env[node] = _fill(literal, lambda: graph.call_method('size', (first, 0)))
        for node in self.whole.nodes:
            if node in self.emit:
                env[node] = graph.node_copy(node, env.__getitem__)
        graph.output([env[node] for node in wanted])
        return graph


def _has_effect(node: fx.Node) -> bool:
    """Whether a node changes a tensor in place and nobody reads its result."""
    in_place = node.op == 'call_method' and str(node.target).endswith('_') and not str(node.target).endswith('__')
    return not node.users and node.op != 'output' and (in_place or node.target is operator.setitem)


def _literal(a: Any, b: Any) -> Any:
    """What to write for a value that is `a` at the first batch size and `b` at the second."""
    if isinstance(a, _Shape):
        return _UNKNOWN
    if isinstance(a, tuple):
        parts = [_literal(x, y) for x, y in zip(a, b)]
        return _UNKNOWN if any(part is _UNKNOWN for part in parts) else tuple(parts)
    if (a, b) == _BATCHES:
        return _BATCH
    return a if a == b else _UNKNOWN


def _fill(literal: Any, batch: Callable) -> Any:
    if isinstance(literal, tuple):
        return tuple(_fill(part, batch) for part in literal)
    return batch() if literal is _BATCH else literal


def cut(whole: Trace, ends: Sequence[fx.Node]) -> Tuple[List[fx.Graph], bool]:
    """Splits a traced backbone after nodes.

    Args:
        whole: The trace.
        ends: The last node of each stage, in the order in which they run; what comes after the last is left out.

    Returns:
        One graph per stage, from a state to the next one; and whether they take images of one size only.
    """
    place = {node: i for i, node in enumerate(whole.nodes)}
    image = whole.nodes[0]
    varying = {image}
    for node in whole.nodes:
        if any(n in varying for n in node.all_input_nodes):
            varying.add(node)
    graphs, sized, wanted = [], False, [ends[-1]]
    for k in reversed(range(len(ends))):
        before = ends[k - 1] if k else image
        segment = _Segment(whole, place, varying, place[before] if k else -1, place[ends[k]], wanted)
        state = [*sorted(segment.inputs - {before}, key=place.__getitem__), before]
        graphs.insert(0, segment.graph(state, wanted))
        sized |= segment.sized
        wanted = state
    return graphs, sized


def lend(module: nn.Module, root: Root) -> None:
    """Gives a module the backbone, and not as a submodule: the network has its layers under their own names."""
    module.__dict__.update(root=root, backbone=root.backbone)  # torch.export looks for `backbone.NAME` in the module


class CutStage(Stage):
    """A stage that runs its part of a backbone's graph; the backbone owns the layers.

    Args:
        root: Holds the backbone.
        graphs: Of eval and of train mode.
        image_size: (H, W) if no other runs, else None.
    """

    def __init__(self, root: Root, graphs: Tuple[fx.Graph, fx.Graph], image_size: Optional[Tuple[int, int]]):
        super().__init__([])
        lend(self, root)
        self.image_size = image_size
        self.graphs = graphs
        self.functions = tuple(map(_function, graphs))

    def __getstate__(self) -> Dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != 'functions'}

    def __setstate__(self, state: Dict[str, Any]) -> None:
        super().__setstate__(state)
        self.functions = tuple(map(_function, self.graphs))

    def run_layers(self, state: List[torch.Tensor]) -> List[torch.Tensor]:
        size = self.image_size
        if size and isinstance(state[0], torch.Tensor) and tuple(state[0].shape[2:]) != size:
            raise InputError(
                f'images of {tuple(state[0].shape[2:])} pixels: this backbone was cut for {size}, resize them or build '
                'it with another img_size')
        return self.functions[self.root.backbone.training](self.root, state)

    def keep_maps(self, kept: List[int]) -> List[int]:
        return kept  # a stage of a pruned network is cut anew

    def uses(self) -> Set[str]:
        """Names of the modules and tensors that it uses."""
        return {str(n.target) for graph in self.graphs for n in graph.nodes if n.op in ('call_module', 'get_attr')}

    def named_modules(self, memo: Optional[Set[nn.Module]] = None, prefix: str = '', remove_duplicate: bool = True
                      ) -> Iterator[Tuple[str, nn.Module]]:
        """Itself and the backbone's modules that it uses: its parameters are theirs."""
        memo = set() if memo is None else memo
        yield from super().named_modules(memo, prefix, remove_duplicate)
        yield from share(self.root, self.uses(), memo, prefix)


def trace_head(root: Root) -> fx.GraphModule:
    """The backbone's own head, traced, for TorchScript."""
    head = _HeadOf(root.backbone)
    head.ends_in_logits = root.ends_in_logits
    graph = _Tracer(root.backbone).trace(head)
    return fx.GraphModule(root, graph)


def cut_stages(root: Root, traces: Tuple[Trace, Trace], taps: Sequence[str], image_size: Tuple[int, int, int],
               to_the_end: bool = True) -> List[CutStage]:
    """The stages of a backbone.

    Args:
        root: Holds the backbone.
        traces: From `trace`.
        taps: Names of the modules that stages end with, in the order in which they run.
        image_size: (C, H, W) of the traces.
        to_the_end: Add a stage for what comes after the last of them.
    """
    cuts = [cut(whole, [*(whole.outputs[tap] for tap in taps), *([whole.end] if to_the_end else [])])
            for whole in traces]
    size = tuple(image_size[1:]) if cuts[0][1] or cuts[1][1] else None
    return [CutStage(root, graphs, None if k else size) for k, graphs in enumerate(zip(cuts[0][0], cuts[1][0]))]


def share(root: Root, used: Set[str], memo: Set[nn.Module], prefix: str) -> Iterator[Tuple[str, nn.Module]]:
    """The used modules of a backbone with all that is in them, and the owners of used tensors, once each."""
    owners = {name.rpartition('.')[0] for name in used}
    inside: Set[str] = set()
    for name, module in root.named_modules():
        if name in used or name.rpartition('.')[0] in inside:
            inside.add(name)
        if name and (name in inside or name in owners) and module not in memo:
            memo.add(module)
            yield f'{prefix}.{name}' if prefix else name, module


def _function(graph: fx.Graph) -> Callable:
    """The Python function of a graph; its first argument is the root."""
    code = graph.python_code('self')
    namespace = dict(code.globals)
    exec(compile(code.src, f'<{id(graph)}>', 'exec'), namespace)
    return namespace['forward']
