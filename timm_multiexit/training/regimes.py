"""How exits on a backbone are trained: everything together, the early exits alone, or the backbone first.

Source: `Joint or Disjoint: Mixing Training Regimes for Early-Exit Models`, Kubaty et al., 2024 -
https://arxiv.org/abs/2407.14320
"""
import argparse
from typing import Optional, Sequence

from ..errors import InputError
from ..models import MultiExitBackbone, MultiExitNet
from ..pretrained.load import load_mean
from ..pretrained.names import may_be_classes

REGIMES = ('joint', 'heads', 'mixed')


def starts_trained(args: argparse.Namespace) -> bool:
    """Whether the network is to be created with trained weights: '--pretrained', or a backbone from a folder or Hub."""
    return args.pretrained or ':' in str(args.model_kwargs.get('backbone', ''))


def prepare(args: argparse.Namespace, model: MultiExitNet, classes: Optional[Sequence[str]] = None) -> None:
    """Loads `--backbone-checkpoint`, and sets the options that a regime stands for.

    'heads' freezes the backbone with its last exit, which must know the classes. 'mixed' trains the backbone with its
    last exit for `backbone_epochs`, then everything; a backbone that knows the classes starts at the second phase.

    Args:
        args: `freeze`, `exit_weights`, `backbone_epochs` and, to what the checkpoint saw, `input_size` are changed.
        model: The network, with its initial weights.
        classes: Names of the classes, if they have any.

    Raises:
        InputError: not a network on a backbone, a checkpoint that does not fit, or 'heads' with other classes.
    """
    if not isinstance(model, MultiExitBackbone):
        if args.backbone_checkpoint or args.regime != 'joint':
            option = '--backbone-checkpoint' if args.backbone_checkpoint else f'--regime {args.regime}'
            raise InputError(f'{option} is for exits on a backbone, not for {args.model}: use --model multiexit')
        return
    own = model.backbone.pretrained_cfg
    knows = (starts_trained(args) and own.get('num_classes') == model.num_classes
             and may_be_classes(own.get('label_names'), classes))
    if args.backbone_checkpoint:
        seen = load_mean(model.backbone, [args.backbone_checkpoint], f"backbone={model._model_args['backbone']}")
        size = seen.pop('input_size', model.pretrained_cfg['input_size'])
        args.input_size = args.input_size or list(size)
        model.pretrained_cfg.update(seen)
    knows = knows or bool(args.backbone_checkpoint or args.initial_checkpoint)
    if args.regime == 'heads':
        if not knows:
            raise InputError(
                f'--regime heads keeps the backbone, and this one does not know the {model.num_classes} classes: use '
                '--regime mixed, or give its weights for them, with --backbone-checkpoint or backbone=local-dir:DIR')
        args.freeze = sorted({*args.freeze, 'backbone'})
        args.exit_weights = args.exit_weights or [1.] * (model.num_exits - 1) + [0.]
    if args.regime == 'mixed':
        if knows:
            args.backbone_epochs = 0
        elif args.backbone_epochs is None:
            args.backbone_epochs = args.epochs // 2
