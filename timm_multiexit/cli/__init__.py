"""The `timm-multiexit` command. Each module without an underscore is a subcommand, with `add_parser` and `run`."""
import argparse
import logging
from typing import Optional, Sequence

from ..commands import Parser
from ..errors import HINT, run_command


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands; its result has the `run` function of the one chosen."""
    from . import benchmark, calibrate, classify, compare, costs, detach, evaluate, export, predict, profile, serve
    parser = Parser(
        prog='timm-multiexit',
        description='Multi-exit image classifiers: classify images, measure, and choose when to stop.', epilog=HINT)
    subparsers = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
    for module in (classify, costs, evaluate, compare, calibrate, profile, benchmark, export, serve, predict, detach):
        module.add_parser(subparsers)
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs a subcommand; returns the status of `run_command`."""
    logging.basicConfig(level=logging.WARNING, format='%(message)s')

    def run(argv):
        args = build_parser().parse_args(argv)
        return args.run(args)
    return run_command('timm-multiexit', run, argv)
