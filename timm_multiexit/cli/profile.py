"""`timm-multiexit profile MODEL`: milliseconds of each stage and head on this machine, kept for --average-latency."""
import argparse
import json

import torch

from ..commands import COUNT
from ..inference.engine import ENGINES, make_engine
from ..inference.profile import device_name, kept_profile, profile
from ..models import exit_costs
from ..stopping.costs import format_macs
from ._common import add_model_argument, add_model_options, load_network, network_name


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        'profile', help='milliseconds of each stage and head on this machine',
        description='Times each stage and each head on random images, and keeps the result in the cache folder. '
                    '--average-latency does so at its first use; this measures again.')
    add_model_argument(parser)
    add_model_options(parser)
    parser.add_argument('--engine', choices=ENGINES, default='auto',
                        help='default: onnx if it is installed, else torch')
    parser.add_argument('--batch-size', type=COUNT, default=1, metavar='N',
                        help='images per batch (default: %(default)s)')
    parser.add_argument('--json', action='store_true', help='for programs: one object')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    model = load_network(args)
    engine = make_engine(model, args.engine)
    costs = exit_costs(model)
    times = profile(model, engine, args.batch_size, costs.input_size, again=True)
    path, _ = kept_profile(model, engine, args.batch_size, costs.input_size)
    if args.json:
        print(json.dumps(dict(stages_ms=times.stages, heads_ms=times.heads, full_ms=times.full, file=str(path))))
        return
    print(f'{network_name(args.model, model)}, {engine.name} engine, {device_name(engine.device)}, '
          f'{torch.get_num_threads()} threads: milliseconds per image at batch {args.batch_size}')
    print(f"{'exit':>4} {'MACs':>9} {'stage':>8} {'head':>8} {'all images leave here':>22}")
    for k, macs in enumerate(costs.macs):
        head = f'{times.heads[k]:>8.3f}' if k < engine.num_exits - 1 else f"{'':>8}"
        print(f'{k + 1:>4} {format_macs(macs):>9} {times.stages[k]:>8.3f} {head} {times.of_exits((k,))[0]:>22.3f}')
    print(f'kept: {path}')
