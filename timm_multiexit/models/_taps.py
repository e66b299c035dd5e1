"""Where exits go in a timm model, and the heads there."""
import difflib
from typing import Dict, List, Sequence, Tuple, Union

import torch
from torch import fx, nn

from ..errors import InputError
from ._base import ExitHead
from ._blocks import init_weights, strided_convs
from ._trace import Trace

HEADS = ('conv', 'linear')
WIDTH = 128  # of a conv head, as in MSDNet


def find_taps(model: nn.Module, whole: Trace, at: Union[int, Sequence[str]]) -> List[str]:
    """Names of the modules that exits follow, in the order in which they run.

    Args:
        model: The backbone.
        whole: Its trace.
        at: A number of early exits, placed at about equal shares of the cost; or names of modules.

    Raises:
        InputError: fewer than one exit, or more than there are places; a name that is not a module, is given twice,
            lies in the head, or gives nothing to classify.
    """
    place = {node: i for i, node in enumerate(whole.nodes)}
    if not isinstance(at, int):
        return sorted(_named(model, whole, place, [at] if isinstance(at, str) else list(at)),
                      key=lambda name: place[whole.outputs[name]])
    places = _places(model, whole, place)
    if isinstance(at, bool) or not 1 <= at <= len(places):
        raise InputError(f'at={at}: {type(model).__name__} takes 1 to {len(places)} early exits, or names of modules')
    total = whole.macs[whole.nodes[-1]]
    taps: List[str] = []
    for k in range(at):
        share = total * (k + 1) / (at + 1)
        # As many places as exits to come stay free behind this one.
        first = places.index(taps[-1]) + 1 if taps else 0
        taps.append(min(places[first:len(places) - at + k + 1],
                        key=lambda name: abs(whole.macs[whole.outputs[name]] - share)))
    return taps


def _places(model: nn.Module, whole: Trace, place: Dict[fx.Node, int]) -> List[str]:
    """Modules after which an exit can be placed: stages and blocks where as few tensors as possible are alive.

    Early exits are cheapest there (Apparate, SOSP 2024): little is carried on for the images that stay.
    """
    listed = {info.get('module') for info in getattr(model, 'feature_info', None) or ()}
    total, modules = whole.macs[whole.nodes[-1]], dict(model.named_modules())
    names: Dict[fx.Node, str] = {}
    simple: Dict[fx.Node, str] = {}  # such as a pooling layer, where the network has no blocks
    for name, node in sorted(whole.outputs.items(), key=lambda item: -len(item[0])):  # the outermost comes last
        if 0.02 < whole.macs[node] / total < 0.98 and not _problem(whole, place, node):
            siblings = modules[name.rpartition('.')[0]].children()
            repeated = sum(type(m) is type(modules[name]) for m in siblings) > 1
            layers = sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in modules[name].modules())
            if layers > 1 and (repeated or name in listed):
                names[node] = name
            elif name in listed:
                simple[node] = name
    names = names or simple
    last_use = {node: max((place[user] for user in node.users), default=-1) for node in whole.nodes}
    alive = {node: sum(place[n] <= place[node] < last_use[n] and whole.is_batch_first(n) for n in whole.nodes)
             for node in names}
    best = [node for node in names if alive[node] == min(alive.values())]
    return [names[node] for node in sorted(best if len(best) > 3 else names, key=place.__getitem__)]


def _named(model: nn.Module, whole: Trace, place: Dict[fx.Node, int], names: Sequence[str]) -> List[str]:
    modules = dict(model.named_modules())
    seen = {}
    if not names:
        raise InputError('at=[]: name at least one module, or give a number of exits')
    for name in names:
        if name not in modules:
            near = difflib.get_close_matches(str(name), modules, n=1, cutoff=0.3)
            raise InputError(f"'{name}' is not a module of {type(model).__name__}"
                             + (f": did you mean '{near[0]}'?" if near else ''))
        node = whole.outputs.get(name)
        reason = 'it does not run before the head' if node is None else _problem(whole, place, node)
        if reason:
            raise InputError(f"no exit after '{name}' of {type(model).__name__}, {reason}: name a block or stage")
        if node in seen:
            raise InputError(f"'{seen[node]}' and '{name}' are the same place: give each exit its own")
        seen[node] = name
    return list(names)


def _problem(whole: Trace, place: Dict[fx.Node, int], node: fx.Node) -> str:
    """Why no exit can follow a node; '' if one can."""
    if not whole.is_batch_first(node) or len(whole.shapes[node][0]) not in (3, 4):
        return 'its output is not a feature map or a sequence for each image'
    if isinstance(whole.end, fx.Node) and place[node] >= place[whole.end]:
        return "it is what the model's own head reads"
    return ''


class AsMap(nn.Module):
    """Reads a tap's output as a map (B, chs, H, W).

    Args:
        kind: 'NCHW'; 'NHWC'; 'NLC' for a sequence of tokens; 'token' for the first of them; 'NC' for a vector.
        chs: Channels.
        num_prefix_tokens: Tokens before those of the patches.
        grid: Height and width of the map.
    """

    def __init__(self, kind: str, chs: int, num_prefix_tokens: int = 0, grid: Tuple[int, int] = (1, 1)):
        super().__init__()
        self.kind = kind
        self.chs = chs
        self.num_prefix_tokens = num_prefix_tokens
        self.grid = grid

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == 'NHWC':
            return x.permute(0, 3, 1, 2)
        if self.kind == 'NLC':
            x = x[:, self.num_prefix_tokens:].transpose(1, 2)
            return x.reshape(x.shape[0], x.shape[1], self.grid[0], -1)
        if self.kind == 'NCHW':
            return x
        return (x[:, 0] if self.kind == 'token' else x)[:, :, None, None]


def as_map(model: nn.Module, shape: Sequence[int], image_size: Tuple[int, int, int]) -> AsMap:
    """How to read a tap of a backbone, from the shape of its output."""
    height, width = image_size[1:]
    off = max(1., height / width) + 0.5  # by rounding of both sides
    if len(shape) == 4:
        first, last = (abs(a - b * height / width) < off for a, b in (shape[2:], shape[1:3]))  # where the map may be
        chs_last = last and (not first or getattr(model, 'output_fmt', 'NCHW') == 'NHWC')
        return AsMap('NHWC', shape[3], grid=shape[1:3]) if chs_last else AsMap('NCHW', shape[1], grid=shape[2:])
    if len(shape) != 3:
        return AsMap('NC', shape[1])
    # The class token may come later, or be one that the model does not tell of.
    named = int(getattr(model, 'num_prefix_tokens', 0))
    for prefix in (named, 0, 1, 2):
        rows = max(1, round((max(shape[1] - prefix, 1) * height / width) ** 0.5))
        columns, rest = divmod(shape[1] - prefix, rows)
        if not rest and abs(rows - columns * height / width) < off:
            return AsMap('NLC', shape[2], prefix, (rows, columns))
    return AsMap('NLC', shape[2], named, (shape[1] - named, 1))


def make_head(model: nn.Module, kind: str, to_map: AsMap) -> ExitHead:
    """An early exit of a backbone.

    Args:
        model: The backbone; the exit has its classes, its dropout and, if linear, its choice of token or mean.
        kind: One of `HEADS`: 'conv' has two strided 3x3 convolutions, as in MSDNet; 'linear' a normalisation only.
        to_map: How to read the tap.
    """
    like = next(model.parameters())
    dd = dict(device=like.device, dtype=like.dtype)
    chs = to_map.chs
    norm = nn.Identity() if to_map.kind == 'NCHW' else nn.LayerNorm(chs, **dd)
    if kind == 'conv':
        after, width = strided_convs(chs, WIDTH, **dd), WIDTH
    else:
        if to_map.num_prefix_tokens and getattr(model, 'global_pool', '') == 'token':
            to_map = AsMap('token', chs)
        after, width = nn.BatchNorm2d(chs, **dd) if to_map.kind == 'NCHW' else nn.Identity(), chs
    places = (getattr(model, 'head_drop', None), getattr(getattr(model, 'head', None), 'drop', None))
    drops = [place.p for place in places if isinstance(place, nn.Dropout)]
    drop_rate = float(getattr(model, 'drop_rate', None) or max(drops, default=0.))
    head = ExitHead(nn.Sequential(norm, to_map, after), chs, width, model.num_classes, drop_rate=drop_rate, **dd)
    return head.apply(init_weights)
