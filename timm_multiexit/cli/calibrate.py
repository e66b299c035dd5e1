"""`timm-multiexit calibrate MODEL --data-dir D`: thresholds for a user's own checkpoint and data, stored beside it."""
import argparse
from pathlib import Path

from ..datasets import class_names
from ..errors import InputError
from ..stopping.config import FILE_NAME, ExitConfig
from ..stopping.costs import format_macs
from ..stopping.solve import METHODS, solve_exit_config
from ._common import add_model_argument, add_model_options, weights_folder
from .evaluate import add_data_options, prepare, split_logits


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        'calibrate', help='thresholds for a checkpoint, from validation images',
        description='Fits temperatures, and thresholds for a range of average budgets, on validation images; writes '
                    f'them to {FILE_NAME} beside the checkpoint, where classify --average-budget finds them.')
    add_model_argument(parser)
    add_model_options(parser)
    add_data_options(parser)
    parser.add_argument('--method', choices=METHODS, default='search', help='default: %(default)s')
    parser.add_argument('--output', metavar='FILE', default='', help=f'default: {FILE_NAME} beside the weights')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    if not args.output and not args.checkpoint and not args.model.startswith('local-dir:'):
        raise InputError(f'calibrate writes {FILE_NAME} beside --checkpoint PATH: pass that, or --output FILE')
    model, dataset = prepare(args)
    output = Path(args.output or Path(weights_folder(args)) / FILE_NAME)
    validation, costs = split_logits(args, model, dataset, 'validation')
    names = class_names(dataset, args.data_dir)
    if names is not None and len(names) != model.num_classes:
        raise InputError(
            f"data set '{dataset}' has {len(names)} classes, the network {model.num_classes}: pass the --dataset that "
            'it was trained on')
    config = solve_exit_config(
        validation.logits, validation.targets, costs, names, method=args.method, measure=args.measure)
    config.save(output)
    print_config(config, len(validation.targets))
    print(f'written: {output}')


def print_config(config: ExitConfig, images: int) -> None:
    print(f'{len(config.policies)} policies from {images:,} validation images')
    print(f"{'budget':>9} {'expected':>9} {'top-1':>6}  share leaving at each exit")
    for p in config.policies[::max(1, len(config.policies) // 10)]:
        shares = ' '.join(f'{100 * s:.0f}%' for s in p.exit_shares)
        print(f'{format_macs(p.budget):>9} {format_macs(p.expected_macs):>9} {p.expected_accuracy:>6.2f}  {shares}')
