"""`timm-multiexit benchmark MODEL`: time of each exit, and of policies against the full network, on this machine."""
import argparse
import json
from typing import Any, Dict, List, Tuple

import torch
from timm.data import resolve_data_config

from ..datasets import load_images, normalize
from ..errors import InputError
from ..evaluation.timing import device_name, measure_exits, measure_policies
from ..files import write_json
from ..inference.engine import ENGINES, make_engine
from ..models import exit_costs
from ..pretrained.exit_config import load_exit_config
from ..pretrained.record import trained_on
from ..stopping.costs import ExitCosts, format_macs, parse_macs
from ..stopping.policy import ExitPolicy, check_exits
from ._common import add_model_argument, add_model_options, load_network, network_name


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        'benchmark', help='time of each exit, and of policies against the full network',
        description='Measures time at batch 1 and at a large batch: of each exit alone, and, with --data-dir, of real '
                    'test images under policies against the full network (all stages, only the last head; BN folded '
                    'on both sides). All take turns within one run, so the ratios are comparable.')
    add_model_argument(parser)
    add_model_options(parser)
    parser.add_argument('--data-dir', default='', metavar='DIR', help='folder of the data set, for policies')
    parser.add_argument('--dataset', default='', metavar='NAME',
                        help="timm's name, like torch/cifar10 or folder (default: what the weights were trained on)")
    parser.add_argument('--average-budget', nargs='+', default=[], metavar='MACS',
                        help='average multiply-adds per image, one or more: measures the policies stored with the '
                             'weights, and the fast ones (default: half of the full cost)')
    parser.add_argument('--policy', nargs='+', default=[], metavar='FILE', help='policies saved as JSON')
    parser.add_argument('--engine', choices=ENGINES, default='auto',
                        help='onnx: onnxruntime, CPU only; auto: that if it is installed, else torch '
                             '(default: %(default)s)')
    parser.add_argument('--images', type=int, default=2000, metavar='N', help='test images (default: %(default)s)')
    parser.add_argument('--batch-size', type=int, default=256, metavar='N', help='the large batch')
    parser.add_argument('--rounds', type=int, default=5, metavar='N', help='measurements of each')
    parser.add_argument('--threads', type=int, default=None, metavar='N', help='CPU threads (default: all cores)')
    parser.add_argument('--json', action='store_true', help='for programs: one object')
    parser.add_argument('--output', default='', metavar='FILE', help='also write that object to a file')
    parser.set_defaults(run=run)


def find_policies(args: argparse.Namespace, costs: ExitCosts) -> List[ExitPolicy]:
    """The policies that the options name.

    Raises:
        InputError: none are stored, one is for another network, or a budget cannot be met.
    """
    policies = [ExitPolicy.load(path) for path in args.policy]
    budgets = [parse_macs(b) for b in args.average_budget]
    if not policies and not budgets:
        budgets = [costs.macs[-1] / 2]
    if budgets:
        config = load_exit_config(args.model, args.checkpoint)
        for b in budgets:
            policies.append(config.policy_for(b))
            if config.fast_policies:
                policies.append(config.policy_for(b, fast=True))
    for policy in policies:
        check_exits(policy, len(costs.macs))
    return policies


def test_images(args: argparse.Namespace, model) -> Tuple[torch.Tensor, torch.Tensor]:
    images, targets = load_images(args.dataset or trained_on(model), args.data_dir, 'test')
    config = resolve_data_config(model=model)
    return normalize(images[:args.images], config['mean'], config['std']), targets[:args.images]


def run(args: argparse.Namespace) -> None:
    for name in ('images', 'batch_size', 'rounds'):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: give 1 or more")
    if args.threads is not None and args.threads < 1:
        raise InputError(f'--threads {args.threads}: give 1 or more')
    if not args.data_dir and (args.policy or args.average_budget):
        raise InputError('which exits are taken depends on the images: pass --data-dir with the data set')
    model = load_network(args)
    costs = exit_costs(model)
    policies = find_policies(args, costs) if args.data_dir else []
    data = test_images(args, model) if policies else None
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads or before)
    try:
        engine = make_engine(model, args.engine)
        results: Dict[str, Any] = dict(
            model=network_name(args.model, model), engine=engine.name, device=device_name(engine.device),
            threads=torch.get_num_threads(),
            torch=torch.__version__, batch_size=args.batch_size, rounds=args.rounds,
            exits=measure_exits(engine, costs, args.batch_size, args.rounds))
        if policies:
            results.update(measure_policies(engine, costs, policies, *data, args.batch_size, args.rounds))
    finally:
        torch.set_num_threads(before)
    if args.output:
        write_json(args.output, results)
    if args.json:
        print(json.dumps(results))
    else:
        print_results(results)


def _cell(value: Dict[str, float], form: str) -> str:
    return f"{value['median']:{form}} ({value['min']:{form}}-{value['max']:{form}})"


def _label(row: Dict[str, Any], results: Dict[str, Any]) -> str:
    if row is results['full']:
        return 'full'
    return f"{row['method'] or 'file'} {format_macs(row['budget'])}" if row['budget'] else row['method'] or 'file'


def print_results(results: Dict[str, Any]) -> None:
    size = results['batch_size']
    print(f"{results['model']}, {results['engine']} engine, {results['device']}, {results['threads']} threads: median "
          f"(min-max) of {results['rounds']} rounds")
    print(f"{'exit':>4} {'MACs':>9} {'ms at batch 1':>24} {f'images/s at batch {size}':>26}")
    for e in results['exits']:
        print(f"{e['exit']:>4} {format_macs(e['macs']):>9} {_cell(e['ms_batch_1'], '.3f'):>24} "
              f"{_cell(e['images_per_s'], '.0f'):>26}")
    if 'full' not in results:
        return
    print(f"\n{results['images']:,} test images; share: of the full network's time (all stages, only the last head)")
    print(f"{'policy':>17} {'average':>9} {'top-1':>6} {'ms at batch 1':>22} {'share':>20} "
          f"{f'images/s at batch {size}':>24} {'share':>20}")
    for row in (results['full'], *results['policies']):
        one, large = row['batch_1'], row[f'batch_{size}']
        average = '' if row is results['full'] else format_macs(row['average_macs'])
        print(f"{_label(row, results):>17} {average:>9} {row['accuracy']:>6.2f} "
              f"{_cell(one['ms_per_image'], '.3f'):>22} {_cell(one['share_of_full_time'], '.2f'):>20} "
              f"{_cell(large['images_per_s'], '.0f'):>24} {_cell(large['share_of_full_time'], '.2f'):>20}")
    for row in results['policies']:
        shares = ' '.join(f'{100 * s:.0f}%' for s in row['exit_shares'])
        print(f"share of images per exit, {_label(row, results)}: {shares}")
