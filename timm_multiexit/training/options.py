"""Options of `train_timm.py`: timm's names, defaults from a YAML file, the command line before both."""
import argparse
from pathlib import Path
from typing import Optional, Sequence

import torch
import yaml
from timm.utils import ParseKwargs

from .task import KD_EXITS


def parse_train_args(description: str, argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """The options of a training run.

    Args:
        description: What the help text begins with.
        argv: Arguments, in place of the command line's.

    Raises:
        SystemExit: an unknown option, or a configuration file that cannot be read or sets one.
    """
    config = argparse.ArgumentParser(add_help=False)
    config.add_argument('-c', '--config', default='', metavar='FILE', help='YAML file with defaults for the options')
    known, rest = config.parse_known_args(argv)

    parser = argparse.ArgumentParser(description=description, parents=[config])
    group = parser.add_argument_group('data')
    group.add_argument('--data-dir', default='data', metavar='DIR', help='folder of the data set')
    group.add_argument('--dataset', default='torch/cifar10', help="timm's name of the data set")
    group.add_argument('--dataset-download', action='store_true', help='let torchvision fetch the data set')
    group.add_argument('--validation-images', type=int, default=5000, metavar='N',
                       help='training images held out by a fixed generator')
    group.add_argument('--loader', choices=['memory', 'timm'], default='memory',
                       help="whole data set on the device with batched augmentation, or timm's PIL pipeline")
    group.add_argument('-j', '--workers', type=int, default=2, help='worker processes of the timm loader')
    group.add_argument('-b', '--batch-size', type=int, default=256, help='images a batch and process')

    group = parser.add_argument_group('model')
    group.add_argument('--model', default='msfuse_cifar.cifar10',
                       help="a network's name; its tag gives the mean and deviation of the images")
    group.add_argument('--num-classes', type=int, default=None, help="default: the data set's")
    group.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs)
    group.add_argument('--initial-checkpoint', default=[], nargs='+', metavar='FILE',
                       help='start from these weights, of several files from their mean')
    group.add_argument('--exit-weights', type=float, nargs='+', default=None, help='loss weight of each exit')
    group.add_argument('--distill-weight', type=float, default=0., help='distillation from the last exit to the others')
    group.add_argument('--distill-temperature', type=float, default=2.)
    group.add_argument('--kd-model-name', default=[], nargs='+', metavar='NAME',
                       help="finished networks that teach all exits, any of timm's for the same classes; the mean of "
                            'all, of a multi-exit one the mean of its exits')
    group.add_argument('--kd-checkpoint', default=[], nargs='+', metavar='FILE',
                       help='the weights of each, default: the pretrained ones')
    group.add_argument('--kd-model-kwargs', nargs='*', default={}, action=ParseKwargs,
                       help='arguments of these networks, where they are not the registered ones')
    group.add_argument('--task-loss-weight', type=float, default=0.5, metavar='C',
                       help='share of the classification loss; the rest is the distillation from those networks')
    group.add_argument('--kd-temperature', type=float, default=2.)
    group.add_argument('--kd-exits', choices=KD_EXITS, default='mean', help="what a multi-exit network teaches: the "
                       "mean of its exits' probabilities, or the last exit's")
    group.add_argument('--kd-draw', action='store_true', help='one of the teachers for each batch, drawn at random')
    group.add_argument('--freeze', nargs='+', default=[], metavar='MODULE',
                       help='modules that keep their weights and BN statistics, by name')

    group = parser.add_argument_group('optimizer and schedule')
    group.add_argument('--opt', default='nmuon', help="timm's name of the optimizer")
    group.add_argument('--opt-kwargs', nargs='*', default={}, action=ParseKwargs, dest='opt_args')
    group.add_argument('--lr', type=float, default=0.03)
    group.add_argument('--momentum', type=float, default=0.95)
    group.add_argument('--weight-decay', type=float, default=0.05, help='on tensors of two or more dimensions')
    group.add_argument('--clip-grad', type=float, default=None, metavar='NORM')
    group.add_argument('--sched', default='cosine', help="timm's name of the schedule; it steps on every update")
    group.add_argument('--epochs', type=int, default=20, help='0: only export the initial weights, by --update-bn')
    group.add_argument('--warmup-epochs', type=int, default=1)
    group.add_argument('--warmup-lr', type=float, default=1e-4)
    group.add_argument('--min-lr', type=float, default=0.)
    group.add_argument('--decay-rate', type=float, default=1., help='exponent, for the poly schedule')
    group.add_argument('--decay-epochs', type=float, default=None)

    group = parser.add_argument_group('augmentation and regularisation')
    group.add_argument('--crop-padding', type=int, default=4, help='reflected border of the random crop, in pixels')
    group.add_argument('--hflip', choices=['alternate', 'random', 'none'], default='alternate')
    group.add_argument('--aa', default=None, metavar='POLICY',
                       help="timm's RandAugment or AutoAugment, such as rand-m7-n2-mstd0.5-inc1")
    group.add_argument('--reprob', type=float, default=0., help='random erasing probability')
    group.add_argument('--recount', type=int, default=1)
    group.add_argument('--mixup', type=float, default=0.)
    group.add_argument('--cutmix', type=float, default=0.)
    group.add_argument('--mixup-prob', type=float, default=1.)
    group.add_argument('--mixup-switch-prob', type=float, default=0.5)
    group.add_argument('--mixup-mode', choices=['batch', 'pair', 'elem'], default='batch')
    group.add_argument('--mixup-off-epoch', type=int, default=0, metavar='N', help='no mixup or cutmix from epoch N on')
    group.add_argument('--smoothing', type=float, default=0.1)
    group.add_argument('--drop', type=float, default=0., help='dropout before the classifiers')
    group.add_argument('--model-ema', action='store_true')
    group.add_argument('--model-ema-decay', type=float, default=0.998)
    group.add_argument('--model-ema-warmup', action='store_true')
    group.add_argument('--update-bn', action='store_true',
                       help='at the end estimate the BN statistics of the final weights, frozen layers too, by a pass '
                            'over the training images: the mean of several weights needs its own')

    group = parser.add_argument_group('machine')
    group.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    group.add_argument('--world-size', type=int, default=None, metavar='N',
                       help='processes that a recipe is for; torchrun starts them, another number is warned of')
    group.add_argument('--threads', type=int, default=0, help='CPU threads, 0 for all')
    group.add_argument('--amp', action='store_true', help='autocast')
    group.add_argument('--amp-dtype', choices=['bfloat16', 'float16'], default='bfloat16')
    group.add_argument('--channels-last', action='store_true')
    group.add_argument('--torchcompile', nargs='?', const='inductor', default=None, metavar='BACKEND')
    group.add_argument('--torchcompile-mode', default=None)
    group.add_argument('--cuda-graph', action='store_true',
                       help='on a CUDA device: each step by one call, without waiting for Python; one process')
    group.add_argument('--cpu-kernels', action='store_true',
                       help='train by kernels of this package, on a CPU with AVX-512 and bfloat16; they are compiled '
                            'once, which needs a C++ compiler and ninja')
    group.add_argument('--seed', type=int, default=42)
    group.add_argument('--benchmark', type=int, default=0, metavar='STEPS',
                       help='time this many bare steps beside as many of the real loop, and stop')

    group = parser.add_argument_group('run')
    group.add_argument('--output', default='output', metavar='DIR')
    group.add_argument('--experiment', default='', help='sub-folder of the run; default: the model and data set')
    group.add_argument('--resume', default='', metavar='FILE',
                       help="checkpoint to go on from; 'auto': the run's last one if there is one")
    group.add_argument('--log-interval', type=int, default=50, metavar='STEPS')
    group.add_argument('--eval-interval', type=int, default=1, metavar='EPOCHS')
    group.add_argument('--checkpoint-interval', type=int, default=1, metavar='EPOCHS')
    group.add_argument('--checkpoint-hist', type=int, default=1, help='best checkpoints to keep beside the last')

    if known.config:
        try:
            settings = yaml.safe_load(Path(known.config).read_text()) or {}
        except (OSError, yaml.YAMLError) as error:
            parser.error(f"config '{known.config}' cannot be read: {error}")
        names = {action.dest for action in parser._actions}
        settings = {key.replace('-', '_'): value for key, value in settings.items()}
        if unknown := sorted(set(settings) - names):
            parser.error(f"config '{known.config}' sets unknown options: {', '.join(unknown)}")
        parser.set_defaults(**settings)
    args = parser.parse_args(rest)
    for name in ('kd_model_name', 'kd_checkpoint', 'initial_checkpoint'):  # a recipe may name one alone
        if isinstance(value := getattr(args, name), str):
            setattr(args, name, [value] if value else [])
    if args.kd_checkpoint and len(args.kd_checkpoint) != len(args.kd_model_name):
        parser.error(f'{len(args.kd_checkpoint)} --kd-checkpoint for {len(args.kd_model_name)} --kd-model-name: '
                     'give a file for each, or none for pretrained weights')
    if args.cpu_kernels and (args.torchcompile or args.device != 'cpu' or not args.channels_last
                             or not args.amp or args.amp_dtype != 'bfloat16'):
        parser.error('--cpu-kernels go with --amp --channels-last --device cpu, in bfloat16 and not compiled')
    if args.cuda_graph and (torch.device(args.device).type != 'cuda' or args.kd_draw):
        parser.error('--cuda-graph goes with --device cuda and without --kd-draw: a graph cannot draw')
    if args.epochs < 1 and not (args.initial_checkpoint and args.update_bn):
        parser.error(f'--epochs {args.epochs} trains nothing: give 1 or more, or --initial-checkpoint and --update-bn')
    args.config = known.config
    args.sched_on_updates = True
    if not args.experiment:
        tagged = args.model if '.' in args.model else f"{args.model}.{args.dataset.split('/')[-1]}"
        args.experiment = tagged.replace('/', '_')
    return args
