"""The `timm-multiexit` command. Each module without an underscore is a subcommand, with `add_parser` and `run`."""
import argparse
import logging
import sys
from typing import Optional, Sequence

from ..errors import InputError


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands; its result has the `run` function of the one chosen."""
    from . import benchmark, calibrate, classify, costs, evaluate
    parser = argparse.ArgumentParser(
        prog='timm-multiexit',
        description='Multi-exit image classifiers: classify images, measure, and choose when to stop.')
    subparsers = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
    for module in (classify, costs, evaluate, calibrate, benchmark):
        module.add_parser(subparsers)
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs a subcommand; returns the exit code: 0, 2 for bad input, 130 when interrupted."""
    logging.basicConfig(level=logging.WARNING, format='%(message)s')
    args = build_parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except InputError as error:
        print(f'timm-multiexit: error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # writes are atomic: no partial file is left
        print('interrupted', file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (head, less) closed the pipe
        sys.stderr.close()
        return 0
