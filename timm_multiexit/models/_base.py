"""The contract of a multi-exit network, and timm's model interface, shared by all architectures.

Data flow: image -> stage 0 -> exit 0 -> stop, or continue -> stage 1 -> exit 1 -> ...

A network is a list of stages and a list of exits of the same length. The *state* is a list of feature maps, batch
first. Stage k maps the state to the next one; the first stage receives `[image]`. The last tensor of a state is the
map that the exit reads, and every other tensor is read by a later stage. So inference may stop after any exit, and may
drop finished images by indexing every tensor of the state.
"""
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, Optional, Sequence, Tuple, Type, TypeVar, Union

import torch
from timm.layers import ClassifierHead, create_classifier
from timm.models import build_model_with_cfg, checkpoint
from timm.models._features import feature_take_indices  # private, but used by every timm model with these methods
from torch import nn

from ._blocks import statistics_kept


class Stage(nn.Module):
    """A chain of layers, each of which maps a state to the next one."""

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        self.grad_checkpointing = False
        self.layers = nn.ModuleList(layers)

    def run_layers(self, state: List[torch.Tensor]) -> List[torch.Tensor]:
        for layer in self.layers:
            state = layer(state)
        return state

    def forward(self, state: List[torch.Tensor]) -> List[torch.Tensor]:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            if torch.compiler.is_compiling():  # the compiler moves statistics once
                return checkpoint(self.run_layers, state)
            return checkpoint(self.run_layers, state, context_fn=self._contexts)
        return self.run_layers(state)

    @torch.jit.ignore
    def _contexts(self) -> Tuple[Any, Any]:
        """Those of the forward and of its repetition in the backward pass, where BN statistics must not move again."""
        return nullcontext(), statistics_kept(self)

    @torch.jit.ignore
    def keep_maps(self, kept: List[int]) -> List[int]:
        """Removes the parts of the stage that only compute maps which are no longer needed.

        A layer that outputs several maps has this method too; one without it maps the last map to the last one.

        Args:
            kept: Output maps that are still needed, counted from the end: -1 is the last.

        Returns:
            Input maps that are then needed, counted from the end.
        """
        for layer in reversed(self.layers):
            kept = layer.keep_maps(kept) if hasattr(layer, 'keep_maps') else [-1]
        return kept


class ExitHead(ClassifierHead):
    """One exit: its own convolutions, global pooling, dropout, linear classifier.

    Args:
        convs: Layers before the pooling, (B, in_chs, H, W) to (B, in_features, H', W').
        in_chs: Channels of the map that the exit reads.
        in_features: Channels after `convs`.
        num_classes: Classes of the classifier, 0 for none.
        pool_type: timm's pooling type, '' for none.
        drop_rate: Dropout before the classifier.
    """

    def __init__(
            self,
            convs: nn.Module,
            in_chs: int,
            in_features: int,
            num_classes: int,
            pool_type: str = 'avg',
            drop_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__(in_features, num_classes, pool_type, drop_rate, device=device, dtype=dtype)
        self.in_chs = in_chs
        self.num_features = in_features * self.global_pool.feat_mult()
        self.convs = convs

    def reset(
            self,
            num_classes: int,
            pool_type: Optional[str] = None,
            in_features: Optional[int] = None,
            device=None,
            dtype=None,
    ) -> None:
        """Replaces the classifier, and the number of features and the pooling where they are given.

        Before 1.0.30, timm's own method takes neither `in_features` nor a device.
        """
        self.in_features = in_features or self.in_features
        pool_type = self.global_pool.pool_type if pool_type is None else pool_type
        self.global_pool, self.fc = create_classifier(
            self.in_features, num_classes, pool_type, device=device, dtype=dtype)
        self.num_features = self.in_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def prune_convs(self) -> None:
        """Removes the exit's convolutions and classifier: the exit then returns the map that it reads."""
        self.convs = nn.Identity()
        self.reset(0, '', in_features=self.in_chs)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.convs(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.global_pool(x)
        x = self.drop(x)
        if pre_logits:
            return x
        return self.fc(x)

    def forward(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return self.forward_head(self.forward_features(x), pre_logits=pre_logits)


class StageBuilder:
    """Cuts a chain of layers into stages: add layers in the order in which they run, and exits between them.

    Args:
        num_classes: Classes of the exits, 0 for no classifier.
        global_pool: timm's pooling type, '' for none.
        drop_rate: Dropout before the classifiers.
    """

    def __init__(self, num_classes: int, global_pool: str, drop_rate: float, device=None, dtype=None):
        self.stages: List[Stage] = []
        self.exits: List[ExitHead] = []
        self.feature_info: List[Dict[str, Any]] = []
        self._layers: List[nn.Module] = []
        self._head_args = (num_classes, global_pool, drop_rate)
        self._dd = dict(device=device, dtype=dtype)

    def add(self, layer: nn.Module) -> None:
        """Appends a layer; it maps a state to the next one."""
        self._layers.append(layer)

    def add_exit(
            self,
            in_chs: int,
            reduction: int,
            convs: Optional[nn.Module] = None,
            in_features: Optional[int] = None,
    ) -> None:
        """Ends a stage after the last layer, with an exit.

        Args:
            in_chs: Channels of the map that the exit reads.
            reduction: Image size divided by the size of that map.
            convs: Layers of the exit before its pooling; None for none.
            in_features: Channels after `convs`; None for `in_chs`.
        """
        self.feature_info.append(dict(num_chs=in_chs, reduction=reduction, module=f'stages.{len(self.stages)}'))
        self.stages.append(Stage(self._layers))
        self._layers = []
        self.exits.append(ExitHead(
            nn.Identity() if convs is None else convs, in_chs, in_features or in_chs, *self._head_args, **self._dd))


class MultiExitNet(nn.Module):
    """Base class of the networks: `stages` and as many `exits`.

    * `model(x)` returns the last exit's logits (B, num_classes) in eval mode. In train mode it returns the mean of all
      exits' logits, so that every parameter gets a gradient with any tool that expects one tensor; after
      `set_exit_training(True)` a tuple of all exits' logits, shallow to deep.
    * `forward_exits(x)` returns the logits of every exit, `iter_exits(x)` computes them one at a time, on demand.

    An architecture builds its stages and exits with a `StageBuilder` and passes them to this constructor.

    Args:
        stages: Each maps a state to the next one.
        exits: One head per stage; it reads the last tensor of the state.
        feature_info: One dict(num_chs, reduction, module) per stage, for the map that its exit reads.
        num_classes: Classes, 0 for no classifier.
        in_chans: Channels of the image.

    Raises:
        ValueError: stages, exits and feature_info differ in number.
    """

    if TYPE_CHECKING:  # timm's builder sets it; TorchScript must not see the annotation
        pretrained_cfg: Dict[str, Any]

    def __init__(
            self,
            stages: Sequence[Stage],
            exits: Sequence[ExitHead],
            feature_info: Sequence[Dict[str, Any]],
            num_classes: int,
            in_chans: int = 3,
    ):
        super().__init__()
        if not len(stages) == len(exits) == len(feature_info) > 0:
            raise ValueError(
                f'a multi-exit network needs one exit and one feature_info entry per stage, got {len(stages)} stages, '
                f'{len(exits)} exits, {len(feature_info)} entries')
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.exit_training = False
        self.feature_info = list(feature_info)
        self.stages = nn.ModuleList(stages)
        self.exits = nn.ModuleList(exits)
        self._read_head_sizes()

    def _read_head_sizes(self) -> None:
        last = self.exits[-1]
        self.global_pool: str = last.global_pool.pool_type
        self.num_features: int = last.in_features
        self.head_hidden_size: int = last.num_features

    @property
    def num_exits(self) -> int:
        return len(self.exits)

    # timm's model interface

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        blocks = r'^stages\.(\d+)' if coarse else r'^stages\.(\d+)\.layers\.(\d+)'
        return dict(stem=r'^stages\.0\.layers\.0', blocks=[(blocks, None), (r'^exits', (99999,))])

    @torch.jit.ignore
    def no_weight_decay(self) -> set:
        return set()

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def set_exit_training(self, enable: bool = True) -> None:
        """Sets whether train mode returns a tuple of all exits' logits (cf. timm's set_distilled_training)."""
        self.exit_training = enable

    @torch.jit.ignore
    def get_classifier(self) -> Tuple[nn.Module, ...]:
        """The linear layers of all exits, shallow to deep."""
        return tuple(head.fc for head in self.exits)

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replaces the classifier of every exit; `global_pool=None` keeps the pooling."""
        self.num_classes = num_classes
        # A head without convolutions and classifier has no parameter that would tell device and dtype.
        like = next(self.parameters())
        for head in self.exits:
            head.reset(num_classes, global_pool, device=like.device, dtype=like.dtype)
        self._read_head_sizes()

    def prune_intermediate_layers(
            self,
            indices: Optional[Union[int, List[int]]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Removes the stages after the deepest of `indices`, all that only they read, and the exits.

        Args:
            indices: Stages to keep: the last n if an int, all if None.
            prune_norm: Remove the last exit's convolutions too: features are then the map that this exit reads.
            prune_head: Remove the classifiers. False leaves a working network that ends at the deepest of `indices`.

        Returns:
            `indices` as numbers from 0.
        """
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[:max_index + 1]
        self.exits = self.exits[:max_index + 1]
        kept = [-1]
        for stage in reversed(self.stages):
            kept = sorted({*stage.keep_maps(kept), -1})  # its exit reads the last
        if prune_head or prune_norm:
            self.num_classes = 0
            for head in self.exits[:-1]:
                head.prune_convs()
            if prune_norm:
                self.exits[-1].prune_convs()
            else:
                self.exits[-1].reset(0, '')
        self._read_head_sizes()
        return take_indices

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """The maps that the exits read, one per stage.

        Args:
            x: Images (B, C, H, W).
            indices: Stages to take: the last n if an int, all if None.
            norm: Apply the last exit's convolutions to the last map.
            stop_early: Do not run stages after the last one taken.
            output_fmt: 'NCHW' only.
            intermediates_only: Return the maps without the final features.

        Returns:
            The maps (B, C_k, H_k, W_k) as a list; unless `intermediates_only`, a tuple of the final features and them.
        """
        assert output_fmt == 'NCHW', 'Output format must be NCHW.'
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        last_index = len(self.stages) - 1
        stages = self.stages[:max_index + 1] if stop_early else self.stages

        intermediates = []
        state = [x]
        for i, stage in enumerate(stages):
            state = stage(state)
            if i in take_indices:
                features = self.exits[i].forward_features(state[-1]) if norm and i == last_index else state[-1]
                # A backbone's own head has no convolutions: it returns what it was given.
                intermediates.append(self.feature_map(i, features) if features is state[-1] else features)
        if intermediates_only:
            return intermediates
        return self.exits[len(stages) - 1].forward_features(state[-1]), intermediates

    @torch.jit.ignore
    def feature_map(self, k: int, x: torch.Tensor) -> torch.Tensor:
        """The last tensor of stage k's state as a map (B, C_k, H_k, W_k)."""
        return x

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """The last exit's map before its pooling, (B, num_features, H, W)."""
        state = [x]
        for stage in self.stages:
            state = stage(state)
        return self.exits[-1].forward_features(state[-1])

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """The last exit's pooling and classifier."""
        return self.exits[-1].forward_head(x, pre_logits=pre_logits)

    def forward_exits(self, x: torch.Tensor) -> List[torch.Tensor]:
        """Logits of every exit, shallow to deep: a list of (B, num_classes)."""
        state = [x]
        logits: List[torch.Tensor] = []
        for stage, head in zip(self.stages, self.exits):
            state = stage(state)
            logits.append(head(state[-1]))
        return logits

    @torch.jit.ignore
    def iter_exits(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """Anytime prediction: yields the logits (B, num_classes) of one exit at a time, shallow to deep.

        A stage runs only when its exit's logits are requested. Closing the generator skips the rest.
        """
        state = [x]
        for stage, head in zip(self.stages, self.exits):
            state = stage(state)
            yield head(state[-1])

    def forward(self, x: torch.Tensor):
        if self.training and self.num_classes > 0:
            logits = self.forward_exits(x)
            if self.exit_training and not torch.jit.is_scripting():
                return tuple(logits)
            return torch.stack(logits).mean(0)
        return self.forward_head(self.forward_features(x))


Network = TypeVar('Network', bound=MultiExitNet)


def build_network(model_cls: Type[Network], variant: str, pretrained: bool = False, **kwargs: Any) -> Network:
    """Builds a registered network by timm's rules; with `features_only` it returns the maps of all stages by default.

    Args:
        model_cls: Class of the network.
        variant: Its name in the registry, with or without tag.
        pretrained: Load the weights of its pretrained cfg.
        **kwargs: Arguments of the class and of timm's `build_model_with_cfg`.
    """
    net = build_model_with_cfg(
        model_cls, variant, pretrained, feature_cfg=dict(out_indices=None, feature_cls='getter'),
        pretrained_filter_fn=getattr(model_cls, 'checkpoint_filter_fn', None), **kwargs)
    if isinstance(net, MultiExitNet) and net.num_exits != len(net.pretrained_cfg['classifier']):
        net.pretrained_cfg['classifier'] = tuple(f'exits.{k}.fc' for k in range(net.num_exits))
    return net
