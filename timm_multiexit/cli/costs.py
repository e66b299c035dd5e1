"""`timm-multiexit costs MODEL`: multiply-adds and parameters of each exit."""
import argparse
import json

import timm

from ..commands import Number
from ..models import MultiExitNet, exit_costs
from ..pretrained.load import load_model
from ..pretrained.names import check_name, without_exits
from ..pretrained.record import find_weights
from ._common import add_model_argument, network_name


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        'costs', help='multiply-adds and parameters of each exit',
        description='Multiply-adds and parameters up to and including each exit, for one image.')
    add_model_argument(parser)
    parser.add_argument('--checkpoint', default='', metavar='PATH', help='your own weights, instead of MODEL')
    parser.add_argument('--input-size', type=Number(int, 1, 4096), nargs=3, metavar=('C', 'H', 'W'), default=None,
                        help='size of the image (default: that of the network)')
    parser.add_argument('--num-classes', type=Number(int, 1, 1_000_000), default=None, metavar='N',
                        help='number of classes (default: that of the network)')
    parser.add_argument('--json', action='store_true', help='print one JSON object')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    name, _ = find_weights(args.model, args.checkpoint)
    check_name(name)
    size = args.input_size
    given = dict(num_classes=args.num_classes, in_chans=size[0] if size else None)
    given = {k: v for k, v in given.items() if v is not None}
    model = load_model(args.model, args.checkpoint, **given) if args.checkpoint else timm.create_model(name, **given)
    if not isinstance(model, MultiExitNet):
        raise without_exits(name)
    costs = exit_costs(model, size)
    if args.json:
        print(json.dumps(dict(
            model=network_name(name, model), num_classes=model.num_classes, input_size=costs.input_size,
            macs=costs.macs, params=costs.params)))
        return
    print(f"{network_name(name, model)}: {model.num_classes} classes, {' x '.join(map(str, costs.input_size))} input")
    print(f"{'exit':>4} {'MACs':>10} {'of full':>8} {'params':>11}")
    for k, (macs, params) in enumerate(zip(costs.macs, costs.params), 1):
        print(f'{k:>4} {macs / 1e6:>8.2f} M {macs / costs.macs[-1]:>8.1%} {params:>11,}')
