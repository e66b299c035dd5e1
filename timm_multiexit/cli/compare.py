"""`timm-multiexit compare NAME NAME...`: networks side by side, at equal cost and at equal accuracy."""
import argparse
from dataclasses import replace
from pathlib import Path
from typing import List, Sequence

from ..commands import device
from ..errors import InputError
from ..evaluation.compare import (
    LOGITS_HELP,
    Entry,
    check_comparable,
    comparison_rows,
    read_logits,
    saved,
    time_budgets,
    write_comparison,
)
from ..evaluation.evaluate import evaluate
from ..evaluation.results import RESULTS_NAME, Results
from ..inference.engine import ENGINES, make_engine
from ..inference.profile import measure_profile
from ..optional import require_extra
from ..pretrained.exit_config import stored_path
from ..stopping.costs import format_macs
from ._common import load_network, open_data
from .evaluate import add_data_options, split_logits


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        'compare', help='networks side by side, at equal cost and at equal accuracy',
        description='Compares networks measured on the same images. With --data-dir they are evaluated now, without it '
                    'their stored results are read. Writes comparison.json, a CSV table and figures, with published '
                    'curves where there are any.')
    parser.add_argument('networks', nargs='+', metavar='NETWORK',
                        help=f'name in the registry, hf-hub:... or local-dir:...; a {RESULTS_NAME}; or a .npz file '
                             f'with {LOGITS_HELP}, of a network of any kind. The first is compared with each other one')
    add_data_options(parser, required=False)
    parser.add_argument('--device', type=device, default='cpu', help='torch device (default: %(default)s)')
    parser.add_argument('--time', action='store_true', help='also against milliseconds, profiled on this machine')
    parser.add_argument('--engine', choices=ENGINES, default='auto', help='for --time (default: %(default)s)')
    parser.add_argument('--output', metavar='DIR', default='comparison', help='default: %(default)s')
    parser.set_defaults(run=run)


def measure(args: argparse.Namespace, name: str) -> Entry:
    """What is known of one network.

    Raises:
        InputError: it is not there, cannot be evaluated, or has no results stored.
    """
    path = Path(name)
    if path.suffix in ('.npz', '.json'):
        if args.time:
            raise InputError(f"'{name}' holds no network to profile: leave out --time")
        results = read_logits(path) if path.suffix == '.npz' else Results.load(path)
        return Entry(path.stem if path.suffix == '.npz' else results.model or name, results)
    args.model, args.checkpoint, args.num_classes = name, '', None
    model = load_network(args) if args.data_dir or args.time else None
    if args.data_dir:
        splits = open_data(args, model)
        validation, costs = split_logits(args, model, splits, 'development')
        test, _ = split_logits(args, model, splits, 'test')
        results, _ = evaluate(validation, test, costs, measure=args.measure)
        results = replace(results, model=name, dataset=splits.dataset)
    else:
        path = stored_path(name, RESULTS_NAME)
        if not path.is_file():
            raise InputError(f"no results are stored with '{name}': pass --data-dir to evaluate it now")
        results = Results.load(path)
    if not args.time:
        return Entry(name, results)
    profile = measure_profile(make_engine(model, args.engine), results.input_size)
    return Entry(name, results, time_budgets(results, profile))


def run(args: argparse.Namespace) -> None:
    require_extra('plots', 'compare')
    entries = [measure(args, name) for name in args.networks]
    check_comparable(entries)
    print_comparison(entries)
    paths = write_comparison(entries, Path(args.output))
    print('written: ' + ', '.join(map(str, paths)))


def print_comparison(entries: Sequence[Entry]) -> None:
    first = entries[0].results
    width = max(len(entry.name) for entry in entries)
    print(f'{first.test_images:,} test images{f" of {first.dataset}" if first.dataset else ""}\n')
    _print_table('accuracy at the same average MACs', entries, comparison_rows(entries), 'macs', width)
    if all(entry.milliseconds is not None for entry in entries):
        _print_table('accuracy at the same average milliseconds', entries, comparison_rows(entries, True), 'ms', width)
    for other in entries[1:]:
        rows = saved(entries[0], other)
        if not rows:
            print(f'{entries[0].name} and {other.name} share no accuracy\n')
            continue
        print(f'average MACs for the same accuracy: {entries[0].name} against {other.name}')
        for row in rows[-6:]:
            less = f"{1 - row['share']:.0%} fewer" if row['share'] <= 1 else f"{row['share'] - 1:.0%} more"
            print(f"{row['accuracy']:>7.1f} %  {format_macs(row['own']):>9}  {format_macs(row['its']):>9}  {less}")
        print()


def _print_table(title: str, entries: Sequence[Entry], rows: List[dict], unit: str, width: int) -> None:
    if not rows:
        print(f'{title}: there is none that all reach\n')
        return
    heads = [f"{row[unit]:.2f} ms" if unit == 'ms' else format_macs(row[unit]) for row in rows]
    print(title + '\n' + ' ' * width + ''.join(f'{head:>10}' for head in heads))
    for entry in entries:
        print(f'{entry.name:<{width}}' + ''.join(f'{row[entry.name]:>10.2f}' for row in rows))
    print()
