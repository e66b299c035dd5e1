"""Exits on any timm model: its graph is cut into stages, and an exit is added at the end of each but the last.

Papers: `BranchyNet: Fast Inference via Early Exiting from Deep Neural Networks`, Teerapittayanon et al., ICPR 2016 -
https://arxiv.org/abs/1709.01686; on training them, `Joint or Disjoint: Mixing Training Regimes for Early-Exit Models`,
Kubaty et al., 2024 - https://arxiv.org/abs/2407.14320
"""
import difflib
from copy import deepcopy
from typing import Any, Dict, Iterator, List, Optional, Sequence, Set, Tuple, Union

import timm
import torch
from timm.models import generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import fx, nn

from ..errors import InputError
from ._base import ExitHead, MultiExitNet, build_network
from ._cut import cut_stages, lend, share
from ._taps import HEADS, as_map, find_taps, make_head
from ._trace import Root, trace, trace_head

__all__ = ['MultiExitBackbone', 'add_exits']


class OwnHead(nn.Module):
    """The last exit: the backbone's own head, with the interface of `ExitHead`.

    Args:
        root: Holds the backbone.
    """

    def __init__(self, root: Root):
        super().__init__()
        lend(self, root)

    @property
    def fc(self) -> nn.Module:
        return self.root.backbone.get_classifier()

    def reset(self, num_classes: int, pool_type: Optional[str] = None, **kwargs: Any) -> None:
        model = self.root.backbone
        model.reset_classifier(num_classes, **({} if pool_type is None else dict(global_pool=pool_type)))
        made = model.get_classifier()
        for layer in made if isinstance(made, (list, tuple)) else [made]:
            layer.to(**kwargs)  # timm before 1.0.31 makes it in float32

    def prune_convs(self) -> None:
        self.reset(0, '')

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        if not self.root.ends_in_logits:
            return self.root.backbone.forward_head(x, **(dict(pre_logits=True) if pre_logits else {}))
        if pre_logits:
            raise InputError(f'{type(self.root.backbone).__name__} pools several maps: it has no pre-logits here')
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(x)

    def named_modules(self, memo: Optional[Set[nn.Module]] = None, prefix: str = '', remove_duplicate: bool = True
                      ) -> Iterator[Tuple[str, nn.Module]]:
        """Itself and the backbone's modules that no stage uses."""
        memo = set() if memo is None else memo
        yield from super().named_modules(memo, prefix, remove_duplicate)
        of_stages = {module for _, module in share(self.root, self.root.used, set(), '')}
        for name, module in share(self.root, {'backbone'}, memo | of_stages, prefix):
            memo.add(module)
            yield name, module


class ScriptHead(nn.Module):
    """`OwnHead` for TorchScript."""

    def __init__(self, graph_module: nn.Module):
        super().__init__()
        self.head = graph_module

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x)


class Stages(nn.ModuleList):
    """The stages of a network, which `timm.utils.reparameterize_model` cuts anew once it has merged the backbone."""

    def reparameterize(self) -> None:
        net = self.net
        if net.num_exits > len(net.taps):
            net.cut_anew(net.num_exits)
        elif net.root.used - {name for names in (net.root.named_modules(), net.root.named_parameters(),
                                                 net.root.named_buffers()) for name, _ in names}:
            raise InputError('a pruned network cannot be cut anew: merge its branches first, then prune it')


class MultiExitBackbone(MultiExitNet):
    """A timm model with early exits. Its parameters keep their names, after `backbone.`; the last exit is its own head.

    Args:
        backbone: The model; it becomes part of the network.
        at: Number of early exits, placed at about equal shares of the cost; or names of modules that they follow.
        head: 'conv' (two strided convolutions) or 'linear', of the early exits.

    Raises:
        InputError: a model, place or head that exits cannot be made of.
    """

    def __init__(self, backbone: nn.Module, at: Union[int, Sequence[str]] = 3, head: str = 'conv'):
        _check(backbone, head)
        root, image_size = Root(backbone), _image_size(backbone)
        traces = trace(root, image_size)
        if not traces[0].is_batch_first(traces[0].end):  # the head reads several maps
            root.ends_in_logits = True
            traces = trace(root, image_size)
        taps = find_taps(backbone, traces[0], at)
        as_maps = [as_map(backbone, traces[0].shape(name), image_size) for name in (*taps, '')]
        infos = [dict(num_chs=m.chs, reduction=image_size[1] // m.grid[0], module=f'stages.{k}')
                 for k, m in enumerate(as_maps)]
        exits = [*(make_head(backbone, head, as_map) for as_map in as_maps[:-1]), OwnHead(root)]
        self.one_size = any(m.kind == 'NLC' for m in as_maps)
        stages = cut_stages(root, traces, taps, image_size, one_size=self.one_size)
        super().__init__(stages, exits, infos, backbone.num_classes, image_size[0])
        self.taps, self.head, self.image_size = taps, head, image_size
        self.as_maps = nn.ModuleList(as_maps)
        self.backbone = backbone
        self._keep(stages)
        for name in ('stages', 'exits'):  # behind the backbone, under whose name its parameters are to be found
            self._modules[name] = self._modules.pop(name)
        self.train(backbone.training)
        self.pretrained_cfg = self.default_cfg = _cfg(self)
        traits = dict(getattr(backbone, '_traits', {}))
        if traits.get('first_conv'):
            traits['first_conv'] = _prefixed(traits['first_conv'])
        self._traits = traits

    def _read_head_sizes(self) -> None:
        last = self.exits[-1]
        if isinstance(last, ExitHead):
            super()._read_head_sizes()
            return
        model = last.root.backbone
        self.global_pool = _pooling(model)
        self.num_features = model.num_features
        self.head_hidden_size = getattr(model, 'head_hidden_size', model.num_features)

    @property
    def root(self) -> Root:
        return self.stages[0].root

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        own = self.backbone.group_matcher(coarse=coarse) if hasattr(self.backbone, 'group_matcher') else dict(stem='')
        if callable(own):
            return lambda name: own(name[len('backbone.'):]) if name.startswith('backbone.') else float('inf')
        groups = {name: _prefixed(value, pattern=True) for name, value in own.items()}
        blocks = groups.get('blocks') or []
        groups['blocks'] = [*([(blocks, None)] if isinstance(blocks, str) else blocks), (r'^exits', (99999,))]
        return groups

    @torch.jit.ignore
    def no_weight_decay(self) -> set:
        own = self.backbone.no_weight_decay() if hasattr(self.backbone, 'no_weight_decay') else ()
        return {f'backbone.{name}' for name in own}

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replaces the classifier of every exit; only the last has pooling other than the mean of a map, or none."""
        self.num_classes = num_classes
        like = next(self.parameters())
        for head in self.exits:
            own = isinstance(head, OwnHead)
            pool = global_pool if own or global_pool is None else '' if global_pool == '' else 'avg'
            head.reset(num_classes, pool, device=like.device, dtype=like.dtype)
        if self.root.ends_in_logits:
            self.cut_anew(self.num_exits)
        self._read_head_sizes()

    def cut_anew(self, num_stages: int) -> None:
        """Makes stages of the backbone as it is now."""
        traces = trace(self.root, self.image_size)
        whole = num_stages > len(self.taps)
        self._keep(cut_stages(self.root, traces, self.taps[:num_stages], self.image_size, whole, self.one_size))
        self.stages.train(self.training)

    def _keep(self, stages: Sequence[nn.Module]) -> None:
        self.stages = Stages(stages)
        self.stages.__dict__['net'] = self  # not as a submodule

    def prune_intermediate_layers(
            self,
            indices: Optional[Union[int, List[int]]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """As timm's, but once only: the modules that it removes would be needed to cut the network anew."""
        _, last = feature_take_indices(len(self.stages), indices)
        self.cut_anew(last + 1)
        taken = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        self._keep(list(self.stages))
        if last < len(self.taps):
            _delete_unused(self.backbone, set().union(*(stage.uses() for stage in self.stages)))
        return taken

    def feature_map(self, k: int, x: torch.Tensor) -> torch.Tensor:
        return self.as_maps[k](x)

    def __prepare_scriptable__(self) -> MultiExitNet:
        """What TorchScript compiles: the stages as modules of their own, in the current mode."""
        stages = [fx.GraphModule(stage.root, stage.graphs[self.backbone.training]) for stage in self.stages]
        *exits, last = self.exits
        last = ScriptHead(trace_head(self.root)) if isinstance(last, OwnHead) else last
        return _Scriptable(stages, [*exits, last], self.feature_info, self.num_classes, self.in_chans).train(
            self.training)

    @property
    def _model_args(self) -> Dict[str, Any]:
        """What builds it again, whatever it was built with: timm saves this, and sets it too."""
        own = {k: v for k, v in getattr(self.backbone, '_model_args', {}).items() if k not in _NOT_REBUILT}
        cfg = getattr(self.backbone, 'pretrained_cfg', None) or {}
        name = '.'.join(filter(None, [cfg.get('architecture'), cfg.get('tag')]))
        if not timm.models.is_model_pretrained(name):  # a tag that timm does not know, of a folder or repository
            name = cfg.get('architecture', '')
        return dict(own, backbone=name, at=list(self.taps), head=self.head)

    @_model_args.setter
    def _model_args(self, args: Dict[str, Any]) -> None:
        pass


class _Scriptable(MultiExitNet):
    def _read_head_sizes(self) -> None:
        pass


def add_exits(model: nn.Module, at: Union[int, Sequence[str]] = 3, head: str = 'conv') -> MultiExitBackbone:
    """Adds early exits to a timm model. The last exit is its own head: in eval mode its logits do not change.

    Args:
        model: Any timm classifier, with or without pretrained weights; it becomes part of the network.
        at: Number of early exits, placed at about equal shares of the cost; or names of modules that they follow.
        head: 'conv' (two strided convolutions) or 'linear', of the early exits. They are to be trained.

    Raises:
        InputError: a model, place or head that exits cannot be made of.
    """
    return MultiExitBackbone(model, at, head)


def _pooling(model: nn.Module) -> Optional[str]:
    """The pooling of a backbone's head, looked for where timm does when it saves a model; None if there is none."""
    head = getattr(model, 'head', None)
    places = (getattr(head, 'global_pool', None), getattr(head, 'pool_type', None), getattr(model, 'global_pool', None))
    return next((pool for pool in (getattr(p, 'pool_type', p) for p in places) if isinstance(pool, str)), None)


_NOT_REBUILT = ('pretrained_cfg', 'pretrained_cfg_overlay', 'features_only')
_SOURCES = ('url', 'file', 'hf_hub_id', 'state_dict')


def _check(model: nn.Module, head: str) -> None:
    name = type(model).__name__
    if isinstance(model, MultiExitNet):
        raise InputError(f'{name} has exits already: give a plain timm model')
    if not all(hasattr(model, part) for part in ('forward_features', 'forward_head', 'num_classes')):
        raise InputError(f'{name} is not a timm classifier: build it with timm.create_model, without features_only')
    if not model.num_classes:  # of some models timm has the image encoder alone
        try:
            model.forward_head(torch.zeros(1))
        except NotImplementedError:
            raise InputError(f'{name} is an encoder without a classifier: give a model that has one') from None
        except Exception:  # it would take real features
            pass
    if head not in HEADS:
        raise InputError(f"unknown head '{head}': choose one of {', '.join(HEADS)}")


def _image_size(model: nn.Module) -> Tuple[int, int, int]:
    """(C, H, W) of the images that a model was built for."""
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    chans, *size = cfg.get('input_size') or (3, 224, 224)
    first = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups == 1), chans)
    built = getattr(getattr(model, 'patch_embed', None), 'img_size', None)
    built = built or getattr(model, '_traits', {}).get('img_size') or size
    height, width = (built, built) if isinstance(built, int) else built
    return int(getattr(model, 'in_chans', first)), int(height), int(width)


def _cfg(net: MultiExitBackbone) -> Dict[str, Any]:
    """The backbone's cfg, with what differs; without the place of its weights, which are not the whole network's."""
    cfg = deepcopy(dict(getattr(net.backbone, 'pretrained_cfg', None) or {}))
    for name in (*_SOURCES, 'source', 'hf_hub_filename', 'label_offset', 'tag'):
        cfg.pop(name, None)
    if cfg.get('num_classes') != net.num_classes:
        cfg.pop('label_names', None)
        cfg.pop('label_descriptions', None)
    own = cfg.get('classifier') or ()
    own = (own,) if isinstance(own, str) else own
    if tuple(cfg.get('input_size', ())) != net.image_size:
        cfg.update(input_size=net.image_size, pool_size=None)
        cfg.pop('test_input_size', None)
    cfg.update(
        architecture='multiexit', custom_load=False, num_classes=net.num_classes,
        classifier=(*(f'exits.{k}.fc' for k in range(net.num_exits - 1)), *(f'backbone.{name}' for name in own)))
    if cfg.get('first_conv'):
        cfg['first_conv'] = _prefixed(cfg['first_conv'])
    return cfg


def _prefixed(value: Any, pattern: bool = False) -> Any:
    """Names of the backbone, or patterns for them, as those of the network."""
    if isinstance(value, str):
        return f'backbone\\.(?:{value.replace("^", "")})' if pattern else f'backbone.{value}'
    return type(value)(_prefixed(v, pattern) for v in value) if isinstance(value, (list, tuple)) else value


def _delete_unused(model: nn.Module, used: Set[str]) -> None:
    """Removes the modules and parameters of a backbone that no stage uses, by their names."""
    names = {name.removeprefix('backbone.') for name in used}
    above = {name[:i] for name in names for i, c in enumerate(name) if c == '.'}
    kept: Set[str] = set()
    for name in [name for name, _ in model.named_modules() if name]:
        parent, _, child = name.rpartition('.')
        if name in names or parent in kept:
            kept.add(name)
        elif name not in above and (not parent or parent in above):
            delattr(model.get_submodule(parent), child)
    for name, _ in list(model.named_parameters()):
        parent, _, child = name.rpartition('.')
        if name not in names and parent not in kept:
            setattr(model.get_submodule(parent), child, None)


def _values(cfg: Any) -> Dict[str, Any]:
    return cfg if isinstance(cfg, dict) else {} if cfg is None else vars(cfg)


default_cfgs = generate_default_cfgs({
    'multiexit': dict(
        input_size=(3, 224, 224), pool_size=(7, 7), interpolation='bicubic', crop_pct=0.875, num_classes=1000,
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), first_conv='backbone.conv_stem',
        classifier=('exits.0.fc', 'exits.1.fc', 'exits.2.fc', 'backbone.classifier')),
})


@register_model
def multiexit(
        pretrained: bool = False,
        backbone: str = 'efficientnet_lite0',
        at: Union[int, Sequence[str]] = 3,
        head: str = 'conv',
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
        pretrained_model_args: Optional[Dict[str, Any]] = None,
        **kwargs: Any,
) -> MultiExitBackbone:
    """Early exits on the timm model `backbone`; other arguments are those of the backbone."""
    if ':' not in backbone and not timm.is_model(backbone):
        near = difflib.get_close_matches(backbone.partition('.')[0], timm.models.list_models(), n=1)
        raise InputError(f"unknown backbone '{backbone}': "
                         + (f'did you mean {near[0]}?' if near else 'choose one of timm.list_models()'))
    if isinstance(pretrained_cfg, str):
        raise InputError(f"multiexit has no tag '{pretrained_cfg}': leave it out")
    values = {**_values(pretrained_cfg), **(pretrained_cfg_overlay or {})}
    stored = any(values.get(name) for name in _SOURCES)
    features = {name: kwargs.pop(name) for name in ('features_only', 'out_indices', 'feature_cls') if name in kwargs}
    if stored and values.get('num_classes'):
        kwargs.setdefault('num_classes', values['num_classes'])
    loading = {name: kwargs[name] for name in ('cache_dir', 'pretrained_strict') if kwargs.get(name) is not None}
    # Where weights are stored, the backbone's are among them: nothing is fetched for it.
    model = timm.create_model(backbone, pretrained=pretrained and not stored, **kwargs)
    net = MultiExitBackbone(model, at, head)
    cfg = pretrained_cfg if stored else net.pretrained_cfg
    return build_network(
        lambda **_: net, 'multiexit', pretrained and stored, pretrained_cfg=cfg,
        pretrained_cfg_overlay=pretrained_cfg_overlay, pretrained_model_args=pretrained_model_args,
        in_chans=net.in_chans, **loading, **features)
