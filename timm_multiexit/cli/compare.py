"""`timm-multiexit compare NAME NAME...`: networks side by side, at equal cost and at equal accuracy."""
import argparse
from dataclasses import replace
from pathlib import Path
from typing import List, Optional, Sequence

from ..commands import device
from ..errors import InputError
from ..evaluation.compare import (
    DEVIATION,
    LOGITS_HELP,
    Entry,
    check_comparable,
    comparison_rows,
    joined_runs,
    read_logits,
    saved,
    time_budgets,
    write_comparison,
)
from ..evaluation.evaluate import RULES, evaluate
from ..evaluation.results import RESULTS_NAME, Results
from ..inference.engine import ENGINES, Engine, make_engine
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
                             f'with {LOGITS_HELP}, of a network of any kind. The first is compared with each other '
                             'one. Several of one name are runs of one network: their mean and spread are shown')
    add_data_options(parser, required=False, measures=RULES, nargs='+', default=[],
                     help='stopping rules to lay side by side, of --data-dir or .npz (default: max_softmax)')
    parser.add_argument('--device', type=device, default='cpu', help='torch device (default: %(default)s)')
    parser.add_argument('--time', action='store_true', help='also against milliseconds, profiled on this machine')
    parser.add_argument('--engine', choices=ENGINES, default='auto', help='for --time (default: %(default)s)')
    parser.add_argument('--output', metavar='DIR', default='comparison', help='default: %(default)s')
    parser.set_defaults(run=run)


def measure(args: argparse.Namespace, name: str) -> List[Entry]:
    """What is known of one network, an entry for each stopping rule.

    Raises:
        InputError: it is not there, cannot be evaluated, or has no results stored.
    """
    path, measures = Path(name), args.measure or ['max_softmax']
    if path.suffix in ('.npz', '.json'):
        if args.time:
            raise InputError(f"'{name}' holds no network to profile: leave out --time")
        if path.suffix == '.npz':
            return _entries(path.stem, [read_logits(path, m) for m in measures])
        stored = _stored(args, path)
        return _entries(stored.model or name, [stored])
    args.model, args.checkpoint, args.num_classes = name, '', None
    model = load_network(args) if args.data_dir or args.time else None
    if args.data_dir:
        splits = open_data(args, model)
        validation, costs = split_logits(args, model, splits, 'development')
        test, _ = split_logits(args, model, splits, 'test')
        results = [replace(evaluate(validation, test, costs, measure=m)[0], model=name, dataset=splits.dataset)
                   for m in measures]
    else:
        path = stored_path(name, RESULTS_NAME)
        if not path.is_file():
            raise InputError(f"no results are stored with '{name}': pass --data-dir to evaluate it now")
        results = [_stored(args, path)]
    return _entries(name, results, make_engine(model, args.engine) if args.time else None)


def _stored(args: argparse.Namespace, path: Path) -> Results:
    results = Results.load(path)
    if args.measure not in ([], [results.measure]):
        raise InputError(f"'{path}' holds results of {results.measure} alone: for other rules pass --data-dir, or "
                         'logits in a .npz file')
    return results


def _entries(name: str, results: Sequence[Results], engine: Optional[Engine] = None) -> List[Entry]:
    profile = None if engine is None else measure_profile(engine, results[0].input_size)
    return [Entry(name if len(results) == 1 else f'{name}, {r.measure}', (r,),
                  None if profile is None else time_budgets(r, profile)) for r in results]


def run(args: argparse.Namespace) -> None:
    require_extra('plots', 'compare')
    entries = joined_runs([entry for name in args.networks for entry in measure(args, name)])
    check_comparable(entries)
    print_comparison(entries)
    paths = write_comparison(entries, Path(args.output))
    print('written: ' + ', '.join(map(str, paths)))


def print_comparison(entries: Sequence[Entry]) -> None:
    first = entries[0].results
    width = max(len(entry.label) for entry in entries)
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
    if any(len(entry.runs) > 1 for entry in entries):
        print('±: standard deviation over the runs; networks without it were trained once\n')


def _print_table(title: str, entries: Sequence[Entry], rows: List[dict], unit: str, width: int) -> None:
    if not rows:
        print(f'{title}: there is none that all reach\n')
        return
    heads = [f"{row[unit]:.2f} ms" if unit == 'ms' else format_macs(row[unit]) for row in rows]
    print(title + '\n' + ' ' * width + ''.join(f'{head:>10}' for head in heads))
    for entry in entries:
        print(f'{entry.label:<{width}}' + ''.join(f'{row[entry.name]:>10.2f}' for row in rows))
        if len(entry.runs) > 1:
            print(f'{"":<{width}}' + ''.join(f'{"±":>6}{row[entry.name + DEVIATION]:.2f}' for row in rows))
    print()
