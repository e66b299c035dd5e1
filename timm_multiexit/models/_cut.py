"""Cuts a traced timm model into stages: its graph is split where the exits go.

What is alive at a cut is the state, a list of tensors whose first dimension is the batch. Everything else that crosses
one is rebuilt in the stage that reads it: constants of the weights (position tables, class tokens) are computed again,
the batch size is read off the state, and other sizes are written into the stage, which then takes one image size only.
"""
import operator
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Set, Tuple

import torch
from torch import fx, nn

from ..errors import InputError
from ._base import Stage
from ._trace import BATCHES, Root, Shape, Trace

_BATCH = object()  # stands for the batch size
_UNKNOWN = object()


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
    if isinstance(a, Shape):
        return _UNKNOWN
    if isinstance(a, tuple):
        parts = [_literal(x, y) for x, y in zip(a, b)]
        return _UNKNOWN if any(part is _UNKNOWN for part in parts) else tuple(parts)
    if (a, b) == BATCHES:
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
        graphs: Those of eval and of train mode.
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

    def train(self, mode: bool = True) -> 'CutStage':
        """Sets the mode of the backbone's modules that it runs."""
        super().train(mode)
        for node in (node for graph in self.graphs for node in graph.nodes if node.op == 'call_module'):
            self.root.get_submodule(str(node.target)).train(mode)
        return self

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


def cut_stages(root: Root, traces: Tuple[Trace, Trace], taps: Sequence[str], image_size: Tuple[int, int, int],
               to_the_end: bool = True, one_size: bool = False) -> List[CutStage]:
    """The stages of a backbone.

    Args:
        root: Holds the backbone.
        traces: From `trace`.
        taps: Names of the modules that stages end with, in the order in which they run.
        image_size: (C, H, W) of the traces.
        to_the_end: Add a stage for what comes after the last of them.
        one_size: Whether what reads the states takes images of this size only.

    Raises:
        InputError: a tap that does not run, as after its layers were merged with others.
    """
    for tap in taps:
        if tap not in traces[0].outputs:
            raise InputError(f"no stage can end with '{tap}', which does not run: name a block or stage")
    cuts = [cut(whole, [*(whole.outputs[tap] for tap in taps), *([whole.end] if to_the_end else [])])
            for whole in traces]
    size = tuple(image_size[1:]) if one_size or cuts[0][1] or cuts[1][1] else None
    stages = [CutStage(root, graphs, None if k else size) for k, graphs in enumerate(zip(cuts[0][0], cuts[1][0]))]
    root.used = set().union(*(stage.uses() for stage in stages))
    return stages


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
