"""Options of `train_timm.py`: timm's names, with defaults from a YAML file that the command line overrides."""
import argparse
from pathlib import Path, PurePath
from typing import List, Optional, Sequence

import torch
from timm.utils import ParseKwargs

from ..commands import BELOW_ONE, COUNT, NOT_NEGATIVE, POSITIVE, SHARE, THREADS, WHOLE, Number, Parser, device
from ..datasets import VALIDATION_IMAGES
from ..errors import HINT, InputError
from ..files import read_yaml
from ..pretrained.hub_files import WEIGHTS_FILE
from .regimes import REGIMES
from .task import KD_EXITS

# timm's that work when they are updated at every step.
SCHEDULES = ('cosine', 'poly', 'tanh', 'step', 'multistep', 'wsd', 'rsqrt', 'constant')


def parse_train_args(description: str, argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """The options of a training run.

    Args:
        description: First line of the help text.
        argv: Arguments; None for those of the command line.

    Raises:
        SystemExit: an unknown option, a value out of its range, options that exclude each other, or a config file that
            cannot be read.
    """
    parser = build_parser(description)
    argv, config = _split_config(argv)
    if config:
        argv = [*_config_arguments(parser, config), *argv]
    args = parser.parse_args(argv)
    _check(parser, args)
    args.config = config
    args.initial_checkpoint = [
        str(path / WEIGHTS_FILE) if path.is_dir() else str(path) for path in map(Path, args.initial_checkpoint)]
    args.sched_on_updates = True
    if args.decay_rate is None:
        args.decay_rate = 0.1 if args.sched in ('step', 'multistep') else 1.
    if args.distill_weight is None:
        args.distill_weight = 1. if args.model.partition('.')[0] == 'multiexit' else 0.
    if not args.experiment:
        tagged = args.model if '.' in args.model else f"{args.model}.{args.dataset.split('/')[-1]}"
        args.experiment = tagged.replace('/', '_')
    return args


def build_parser(description: str) -> argparse.ArgumentParser:
    """The parser of all options; `parse_train_args` reads `--config` first."""
    parser = Parser(description=description, epilog=HINT)
    parser.add_argument('-c', '--config', default='', metavar='FILE', help='YAML file with defaults for the options')
    _add_data_options(parser)
    _add_model_options(parser)
    _add_loss_options(parser)
    _add_optimizer_options(parser)
    _add_augmentation_options(parser)
    _add_machine_options(parser)
    _add_run_options(parser)
    for action in parser._actions:
        tells = action.default is not False and action.default not in (None, '', [], {}, argparse.SUPPRESS)
        if tells and 'default' not in (action.help or ''):
            action.help = f'{action.help or ""} (default: %(default)s)'.strip()
    for action in list(parser._actions):  # what a recipe switches on can be switched off
        if isinstance(action, argparse._StoreTrueAction):
            parser.add_argument(f'--no-{action.option_strings[-1][2:]}', dest=action.dest, action='store_false',
                                help=argparse.SUPPRESS)
    return parser


class _Kwargs(ParseKwargs):
    """timm's, with an error for what is not NAME=VALUE."""

    def __call__(self, parser, namespace, values, option_string=None):
        if wrong := [value for value in values if value and '=' not in value]:
            raise argparse.ArgumentError(self, f"'{wrong[0]}' is not NAME=VALUE")
        super().__call__(parser, namespace, values, option_string)


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('data')
    group.add_argument('--data-dir', default='data', metavar='DIR', help='folder of the data set')
    group.add_argument('--dataset', default='torch/cifar10', help="timm's name of the data set")
    group.add_argument('--dataset-download', action='store_true', help='let torchvision download the data set')
    group.add_argument('--validation-images', type=WHOLE, default=None, metavar='N',
                       help='training images to hold out for temperatures, thresholds and the choice of epochs, the '
                            f'same ones in every run (default: of CIFAR {VALIDATION_IMAGES}, of a folder 10 %%, or '
                            'those of val/ beside test/)')
    group.add_argument('--certification-images', type=WHOLE, default=None, metavar='N',
                       help='training images to hold out for a guarantee alone (default: 10 %% of a folder, or half of '
                            'val/ beside test/, where those are enough for one)')
    group.add_argument('--input-size', type=COUNT, nargs='+', default=None, metavar='N',
                       help="pixels that the network sees: one number, or channels, height and width (default: the "
                            "images' own size, with --pretrained that of the weights)")
    group.add_argument('--in-chans', type=COUNT, default=None, help='channels: 1 for grey (default: 3)')
    group.add_argument('--loader', choices=['memory', 'timm'], default=None,
                       help="whole data set on the device with batched augmentation, or timm's PIL pipeline, which "
                            'streams files (default: memory where it fits)')
    group.add_argument('-j', '--workers', type=WHOLE, default=2, help='worker processes of the timm loader')
    group.add_argument('-b', '--batch-size', type=COUNT, default=256, help='images per batch and process')


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('model')
    group.add_argument('--model', default='msfuse_cifar.cifar10',
                       help='name of the network; its tag sets the mean and deviation of the images')
    group.add_argument('--num-classes', type=Number(int, 2), default=None, help="default: the data set's")
    group.add_argument('--model-kwargs', nargs='*', default={}, action=_Kwargs)
    group.add_argument('--initial-checkpoint', default=[], nargs='+', metavar='PATH',
                       help='start from these weights, files or folders final/ of runs, from their mean if there are '
                            'several; --regime joint leaves out classifiers of another number of classes')
    group.add_argument('--pretrained', action='store_true',
                       help="start from the pretrained weights of the network, or of multiexit's backbone")
    group.add_argument('--backbone-checkpoint', default='', metavar='FILE',
                       help="weights of multiexit's backbone, for the classes of the data set, as timm's train.py "
                            'saves; their size of images and normalisation are taken over')
    group.add_argument('--regime', choices=REGIMES, default='joint',
                       help='joint: everything together; for multiexit also heads: the early exits alone, on a frozen '
                            'backbone that was trained for these classes; mixed: the backbone first, then everything')
    group.add_argument('--backbone-epochs', type=WHOLE, default=None, metavar='N',
                       help='epochs of the first phase of --regime mixed (default: half)')
    group.add_argument('--freeze', nargs='+', default=[], metavar='MODULE',
                       help='names of modules that keep their weights and BN statistics')


def _add_loss_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('loss and distillation')
    group.add_argument('--exit-weights', type=NOT_NEGATIVE, nargs='+', default=None, help='loss weight of each exit')
    group.add_argument('--distill-weight', type=NOT_NEGATIVE, default=None,
                       help='weight of the distillation from the last exit to the others (default: 0, 1 for multiexit)')
    group.add_argument('--distill-temperature', type=POSITIVE, default=2.)
    group.add_argument('--kd-model-name', default=[], nargs='+', metavar='NAME',
                       help="trained networks to distil from into every exit, any of timm's for the same classes; "
                            'the target is the mean of their probabilities')
    group.add_argument('--kd-checkpoint', default=[], nargs='+', metavar='FILE',
                       help="each teacher's weights (default: the pretrained ones)")
    group.add_argument('--kd-model-kwargs', nargs='*', default={}, action=_Kwargs,
                       help='arguments of the teachers that differ from the registered ones')
    group.add_argument('--task-loss-weight', type=SHARE, default=0.5, metavar='C',
                       help="share of the classification loss; the rest is the teachers' distillation loss")
    group.add_argument('--kd-temperature', type=POSITIVE, default=2.)
    group.add_argument('--kd-exits', choices=KD_EXITS, default='mean',
                       help="target from a multi-exit teacher: the mean of its exits' probabilities or the last exit's")
    group.add_argument('--kd-draw', action='store_true', help='use one teacher per batch, drawn at random')
    group.add_argument('--smoothing', type=BELOW_ONE, default=0.1, help='label smoothing')


def _add_optimizer_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('optimizer and schedule')
    group.add_argument('--opt', default='nmuon', help="timm's name of the optimizer")
    group.add_argument('--opt-kwargs', nargs='*', default={}, action=_Kwargs, dest='opt_args')
    group.add_argument('--lr', type=NOT_NEGATIVE, default=0.03)
    group.add_argument('--momentum', type=BELOW_ONE, default=0.95)
    group.add_argument('--weight-decay', type=NOT_NEGATIVE, default=0.05, help='on tensors of two or more dimensions')
    group.add_argument('--clip-grad', type=POSITIVE, default=None, metavar='NORM')
    group.add_argument('--sched', choices=SCHEDULES, default='cosine', help="timm's schedule, updated at every step")
    group.add_argument('--epochs', type=WHOLE, default=20,
                       help='0: only export the initial weights, with new BN statistics (--update-bn)')
    group.add_argument('--warmup-epochs', type=WHOLE, default=1)
    group.add_argument('--warmup-lr', type=NOT_NEGATIVE, default=1e-4)
    group.add_argument('--min-lr', type=NOT_NEGATIVE, default=0.)
    group.add_argument('--decay-rate', type=POSITIVE, default=None,
                       help='factor of the step and multistep schedules (default: 0.1), exponent of poly (default: 1)')
    group.add_argument('--decay-epochs', type=POSITIVE, default=None)
    group.add_argument('--decay-milestones', type=COUNT, nargs='+', default=[90, 180, 270], metavar='EPOCH')
    group.add_argument('--model-ema', action='store_true')
    group.add_argument('--model-ema-decay', type=BELOW_ONE, default=0.998)
    group.add_argument('--model-ema-warmup', action='store_true')
    group.add_argument('--update-bn', action='store_true',
                       help='finally recompute the BN statistics, of frozen layers too, in one pass over the training '
                            'images; a mean of weights needs it')


def _add_augmentation_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('augmentation and regularisation')
    group.add_argument('--crop-padding', type=WHOLE, default=4, help='reflected border of the random crop, in pixels')
    group.add_argument('--hflip', choices=['alternate', 'random', 'none'], default='alternate')
    group.add_argument('--aa', default=None, metavar='POLICY',
                       help="timm's RandAugment or AutoAugment, such as rand-m7-n2-mstd0.5-inc1")
    group.add_argument('--reprob', type=SHARE, default=0., help='random erasing probability')
    group.add_argument('--recount', type=COUNT, default=1)
    group.add_argument('--mixup', type=NOT_NEGATIVE, default=0.)
    group.add_argument('--cutmix', type=NOT_NEGATIVE, default=0.)
    group.add_argument('--mixup-prob', type=SHARE, default=1.)
    group.add_argument('--mixup-switch-prob', type=SHARE, default=0.5)
    group.add_argument('--mixup-mode', choices=['batch', 'pair', 'elem'], default='batch')
    group.add_argument('--mixup-off-epoch', type=WHOLE, default=0, metavar='N',
                       help='no mixup or cutmix from epoch N on (default: never)')
    group.add_argument('--drop', type=BELOW_ONE, default=0., help='dropout before the classifiers')


def _add_machine_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('machine')
    group.add_argument('--device', type=device, default='cuda' if torch.cuda.is_available() else 'cpu')
    group.add_argument('--world-size', type=COUNT, default=None, metavar='N',
                       help='processes that a recipe is written for; another number under torchrun gives a warning')
    group.add_argument('--threads', type=THREADS, default=0, help="CPU threads; 0 leaves PyTorch's default")
    group.add_argument('--amp', action='store_true', help='autocast')
    group.add_argument('--amp-dtype', choices=['bfloat16', 'float16'], default='bfloat16')
    group.add_argument('--channels-last', action='store_true')
    group.add_argument('--torchcompile', nargs='?', const='inductor', default=None, metavar='BACKEND')
    group.add_argument('--torchcompile-mode', default=None)
    group.add_argument('--cuda-graph', action='store_true',
                       help='capture the whole step once and replay it (CUDA, one process)')
    group.add_argument('--cpu-kernels', action='store_true',
                       help='faster kernels for CPUs with AVX-512 and bfloat16, compiled at the first start (needs a '
                            'C++ compiler and ninja)')
    group.add_argument('--seed', type=Number(int, 0, 2 ** 32 - 1), default=42)
    group.add_argument('--benchmark', type=WHOLE, default=0, metavar='STEPS',
                       help='measure the throughput over this many steps, without and with the loader, and stop')


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('run')
    group.add_argument('--output', default='output', metavar='DIR')
    group.add_argument('--experiment', default='', help='folder of the run in --output (default: model and data set)')
    group.add_argument('--resume', default='', metavar='FILE',
                       help="checkpoint to resume from; 'auto': the run's latest, if there is one")
    group.add_argument('--overwrite', action='store_true', help='replace the run that the folder holds')
    group.add_argument('--log-interval', type=COUNT, default=50, metavar='STEPS')
    group.add_argument('--eval-interval', type=COUNT, default=1, metavar='EPOCHS')
    group.add_argument('--checkpoint-interval', type=COUNT, default=1, metavar='EPOCHS')
    group.add_argument('--checkpoint-hist', type=COUNT, default=1, help='best checkpoints to keep besides the latest')


def _split_config(argv: Optional[Sequence[str]]):
    parser = Parser(add_help=False)
    parser.add_argument('-c', '--config', default='')
    known, rest = parser.parse_known_args(argv)
    return rest, known.config


def _config_arguments(parser: argparse.ArgumentParser, path: str) -> List[str]:
    """The settings of a YAML file as arguments, so that they pass the same checks."""
    try:
        settings = read_yaml(path, 'config') or {}
    except InputError as error:
        parser.error(str(error))
    if not isinstance(settings, dict):
        parser.error(f"config '{path}' holds {type(settings).__name__}: give lines of OPTION: VALUE")
    actions, argv = {action.dest: action for action in reversed(parser._actions)}, []  # not --no-...
    if unknown := sorted(str(name) for name in settings if name not in actions):
        parser.error(f"config '{path}' sets unknown options: {', '.join(unknown)} (names as in a run's recipe.yaml, "
                     'with underscores)')
    for name, value in settings.items():
        action = actions[name]
        flag, several = action.option_strings[-1], action.nargs in ('*', '+')
        if value is None or value in ('', [], {}):
            continue
        if action.nargs == 0 and isinstance(value, bool):
            argv += [flag] * value
        elif action.nargs == 0 or (isinstance(value, (list, dict)) and not several):
            wanted = 'true or false' if action.nargs == 0 else 'one value'
            parser.error(f"config '{path}' sets {name} to {value!r}: give {wanted}")
        elif isinstance(value, dict):
            argv += [flag, *(f'{k}={v!r}' for k, v in value.items())]
        elif several:
            argv += [flag, *map(str, value if isinstance(value, list) else [value])]
        else:
            argv.append(f'{flag}={value}')
    return argv


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.kd_checkpoint and len(args.kd_checkpoint) != len(args.kd_model_name):
        parser.error(f'{len(args.kd_checkpoint)} --kd-checkpoint for {len(args.kd_model_name)} --kd-model-name: '
                     'give a file for each, or none for pretrained weights')
    if args.cpu_kernels and (args.torchcompile or args.device != 'cpu' or not args.channels_last
                             or not args.amp or args.amp_dtype != 'bfloat16'):
        parser.error('--cpu-kernels needs --amp --channels-last --device cpu, in bfloat16 and not compiled: change '
                     'that, or add --no-cpu-kernels')
    if args.cuda_graph and args.regime == 'mixed':
        parser.error('--cuda-graph captures one kind of step: use another --regime')
    if args.cuda_graph and args.amp and args.amp_dtype == 'float16':
        parser.error('--cuda-graph cannot scale the loss, as float16 needs: use bfloat16')
    if args.backbone_epochs and args.regime != 'mixed':
        parser.error(f'--backbone-epochs is for --regime mixed, not {args.regime}: omit it, or set it to 0')
    if args.cuda_graph and (torch.device(args.device).type != 'cuda' or args.kd_draw):
        parser.error('--cuda-graph needs --device cuda and excludes --kd-draw: a graph cannot draw')
    if args.overwrite and args.resume:
        parser.error('--overwrite starts anew, --resume continues: choose one')
    if '..' in PurePath(args.experiment).parts or PurePath(args.experiment).is_absolute():
        parser.error(f"--experiment '{args.experiment}' leaves --output: give a name")
    if len(args.input_size or ()) == 2 or len(args.input_size or ()) > 3:
        parser.error(f'--input-size {args.input_size}: give one number, or channels, height and width')
    if args.batch_size < 2 and (args.mixup or args.cutmix):
        parser.error('--mixup and --cutmix pair images: use a --batch-size of 2 or more')
    if args.warmup_epochs > max(args.epochs, 1):
        parser.error(f'--warmup-epochs {args.warmup_epochs} of --epochs {args.epochs}: warm up for fewer')
    first = {'step': args.decay_epochs or 90, 'multistep': min(args.decay_milestones)}.get(args.sched, 0)
    if first >= max(args.epochs, 1):
        parser.error(f'--sched {args.sched} would first decay after {first:g} of {args.epochs} epochs: set '
                     f'--decay-{"epochs" if args.sched == "step" else "milestones"}')
    if args.epochs < 1 and not (args.initial_checkpoint and args.update_bn):
        parser.error(f'--epochs {args.epochs} trains nothing: give 1 or more, or --initial-checkpoint and --update-bn')
