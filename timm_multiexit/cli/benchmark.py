"""`timm-multiexit benchmark MODEL`: time of each exit, and of policies against the full network, on this machine."""
import argparse
import json
import os
import sys
from typing import Any, Dict, Optional, Tuple

import torch

from ..commands import COUNT, Number
from ..data.images import Images
from ..datasets import normalize
from ..errors import InputError
from ..evaluation.timing import measure_exits, measure_policies
from ..files import require_writable, write_json
from ..inference.engine import ENGINES, Engine, make_engine
from ..inference.preprocess import Preprocessing
from ..inference.profile import device_name, measure_profile
from ..models import exit_costs
from ..stopping.config import ExitConfig
from ..stopping.costs import format_macs, parse_macs
from ..stopping.policy import ExitPolicy, check_exits
from ._common import (
    add_budget_options,
    add_model_argument,
    add_model_options,
    asks_for_policy,
    load_network,
    network_name,
    open_data,
    stored_exit_config,
)

# At 224 pixels an image costs tens of times as much as at 32, and minutes would become hours.
IMAGES, BATCH_SIZE, FULL_LOAD = 2000, 256, 150e6
DEFAULT_SHARE = '50%'  # of the full network's time


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
    add_budget_options(parser, parser, nargs='+', default=[])
    parser.add_argument('--policy', nargs='+', default=[], metavar='FILE', help='policies saved as JSON')
    parser.add_argument('--engine', choices=ENGINES, default='auto',
                        help='onnx: onnxruntime, CPU only; auto: that if it is installed, else torch '
                             '(default: %(default)s)')
    parser.add_argument('--images', type=COUNT, default=None, metavar='N',
                        help=f'test images (default: {IMAGES}, fewer if one costs over {FULL_LOAD / 1e6:g} M MACs)')
    parser.add_argument('--batch-size', type=COUNT, default=None, metavar='N',
                        help=f'the large batch (default: {BATCH_SIZE}, smaller in the same way)')
    parser.add_argument('--rounds', type=COUNT, default=5, metavar='N', help='timed rounds (default: %(default)s)')
    parser.add_argument('--threads', type=Number(int, 1, os.cpu_count() or 1), default=None, metavar='N',
                        help="CPU threads (default: PyTorch's)")
    parser.add_argument('--json', action='store_true', help='for programs: one object')
    parser.add_argument('--output', default='', metavar='FILE', help='also write that object to a file')
    parser.set_defaults(run=run)


def default_amounts(macs: int) -> Tuple[int, int]:
    """Test images and batch size for a network of so many MACs.

    >>> default_amounts(75_000_000), default_amounts(4_000_000_000)
    ((2000, 256), (75, 9))
    """
    share = min(1., FULL_LOAD / macs)
    return max(50, int(share * IMAGES)), max(8, int(share * BATCH_SIZE))


def named_policies(args: argparse.Namespace, config: Optional[ExitConfig], num_exits: int) -> Dict[str, ExitPolicy]:
    """The policies that the options name by a file, a MACs budget or a loss; keys are labels for the report.

    Raises:
        InputError: one is for another network, or a budget or loss cannot be met.
    """
    policies = {path: ExitPolicy.load(path) for path in args.policy}
    for policy in policies.values():
        check_exits(policy, num_exits)
    if config is not None:
        policies.update((format_macs(b), config.policy_for(b)) for b in map(parse_macs, args.average_budget))
        policies.update((f'{x:g} points', config.policy_for(max_loss=x, certainty=args.certainty, risk=args.risk))
                        for x in args.max_loss)
    return policies


def latency_policies(
        args: argparse.Namespace,
        config: ExitConfig,
        engine: Engine,
        required: bool = True,
) -> Dict[str, ExitPolicy]:
    """Those of --average-latency; the profile is measured in this very run, so that times compare.

    A share of the full network's time is solved for both batch sizes, milliseconds for batch 1.

    Raises:
        InputError: one cannot be met; if they are not `required`, that is a note.
    """
    policies = {}
    for size in (1, args.batch_size):
        texts = [t for t in args.average_latency if size == 1 or t.endswith('%')]
        profile = measure_profile(engine, config.input_size, size) if texts else None
        for text in texts:
            try:
                policies[f'{text} at batch {size}'] = config.policy_for(average_ms=text, profile=profile)
            except InputError as error:
                if required:
                    raise
                print(f'note: no policy for {text} of the time at batch {size}: {error}', file=sys.stderr)
    return policies


def test_images(args: argparse.Namespace, model) -> Tuple[torch.Tensor, torch.Tensor]:
    preprocess = Preprocessing.of(model)
    split = open_data(args, model)['test'].some(args.images)
    images, targets = Images(split, preprocess, label='test').stack()
    return normalize(images, preprocess.mean, preprocess.std), targets


def run(args: argparse.Namespace) -> None:
    if not args.data_dir and (args.policy or asks_for_policy(args)):
        raise InputError('which exits are taken depends on the images: pass --data-dir with the data set')
    if args.output:
        require_writable(args.output)
    model = load_network(args)
    costs, config, policies = exit_costs(model), None, {}
    images, batch_size = default_amounts(costs.macs[-1])
    args.images, args.batch_size = args.images or images, args.batch_size or batch_size
    by_default = bool(args.data_dir) and not args.policy and not asks_for_policy(args)
    if args.data_dir:
        if by_default:
            half = costs.macs[-1] / 2
            # Of some networks the first exit costs more than half.
            args.average_budget = [str(half if half >= costs.macs[0] else (costs.macs[0] + costs.macs[-1]) / 2)]
            args.average_latency = [DEFAULT_SHARE]
        if asks_for_policy(args):
            config = stored_exit_config(args, model)
        policies = named_policies(args, config, model.num_exits)
        data = test_images(args, model)
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads or before)
    try:
        engine = make_engine(model, args.engine)
        results: Dict[str, Any] = dict(
            model=network_name(args.model, model), engine=engine.name, device=device_name(engine.device),
            threads=torch.get_num_threads(),
            torch=torch.__version__, batch_size=args.batch_size, rounds=args.rounds,
            exits=measure_exits(engine, costs, args.batch_size, args.rounds))
        if config is not None:
            policies.update(latency_policies(args, config, engine, required=not by_default))
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
        print(f"{row['name']:>17} {average:>9} {row['accuracy']:>6.2f} "
              f"{_cell(one['ms_per_image'], '.3f'):>22} {_cell(one['share_of_full_time'], '.2f'):>20} "
              f"{_cell(large['images_per_s'], '.0f'):>24} {_cell(large['share_of_full_time'], '.2f'):>20}")
    slower = [row['name'] for row in results['policies'] if row['batch_1']['share_of_full_time']['median'] > 1.]
    if slower:
        print(f"note: at batch 1 the full network is faster than {', '.join(slower)}: on this device the heads and the "
              'decisions cost more than the stages that are skipped')
    for row in results['policies']:
        shares = ' '.join(f'{100 * s:.0f}%' for s in row['exit_shares'])
        print(f"share of images per exit, {row['name']}: {shares}")
