"""`timm-multiexit compare NAME NAME...`: networks side by side, at equal cost and at equal accuracy."""
import argparse
from dataclasses import replace
from pathlib import Path
from typing import List, Sequence

from ..commands import COUNT, device
from ..errors import InputError
from ..evaluation.compare import (
    COMPARISON_NAME,
    DEVIATION,
    Entry,
    check_comparable,
    comparison_rows,
    joined_runs,
    saved,
    time_budgets,
    write_comparison,
)
from ..evaluation.evaluate import AGREEMENT, RULES, evaluate
from ..evaluation.logits_file import LOGITS_HELP, SUFFIX, read_logits
from ..evaluation.results import RESULTS_NAME, Results
from ..files import require_writable
from ..inference.engine import ENGINES, make_engine
from ..inference.profile import measure_profile
from ..models import exit_costs
from ..optional import require_extra
from ..pretrained.exit_config import stored_path
from ..pretrained.names import check_name
from ..stopping.costs import format_macs
from ..stopping.policy import MEASURES
from ._common import load_network, open_data
from .evaluate import add_image_options, split_logits


def rules(text: str) -> List[str]:
    """Stopping rules separated by commas, for argparse."""
    names = list(dict.fromkeys(text.split(',')))
    unknown = [name for name in names if name not in RULES]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown stopping rule '{unknown[0]}': choose from {', '.join(RULES)}")
    return names


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        'compare', help='networks side by side, at equal cost and at equal accuracy',
        description='Compares networks measured on the same images. With --data-dir they are evaluated now, without it '
                    'their stored results are read. Writes comparison.json, a CSV table and figures, with published '
                    'curves where there are any.')
    parser.add_argument('networks', nargs='+', metavar='[NAME=]NETWORK',
                        help=f'name in the registry, hf-hub:... or local-dir:...; a {RESULTS_NAME}; or a .npz file '
                             f'with {LOGITS_HELP}. The first is compared with each other one. Of several runs with the '
                             'same NAME=, mean and spread are shown')
    add_image_options(parser)
    parser.add_argument('--batch-size', type=COUNT, default=256, metavar='N')
    parser.add_argument('--measure', type=rules, default=['max_softmax'], metavar='RULE,...',
                        help='stopping rules to lay side by side, for --data-dir or .npz files: confidence by '
                             f'{", ".join(MEASURES)}, or {AGREEMENT}, where an image leaves once 2, 3 or more '
                             'consecutive exits agree (default: max_softmax)')
    parser.add_argument('--device', type=device, default='cpu', help='torch device (default: %(default)s)')
    parser.add_argument('--time', action='store_true', help='also against milliseconds, profiled on this machine')
    parser.add_argument('--engine', choices=ENGINES, default='auto', help='for --time (default: %(default)s)')
    parser.add_argument('--output', metavar='DIR', default='comparison', help='default: %(default)s')
    parser.set_defaults(run=run)


def measure(args: argparse.Namespace, given: str) -> List[Entry]:
    """What is known of one network, an entry for each stopping rule.

    Args:
        args: Options.
        given: `[NAME=]NETWORK`.

    Raises:
        InputError: it is not there, cannot be evaluated, or has no results stored.
    """
    name, equals, source = given.rpartition('=')
    if not equals or not name or Path(given).exists():
        name, source = '', given
    path, model, logits = Path(source), None, None
    if path.suffix in (SUFFIX, '.json'):
        if args.time:
            raise InputError(f"'{source}' holds no network to profile: leave out --time")
        if path.suffix == SUFFIX:
            name, logits = name or path.stem, read_logits(path)
    else:
        name = name or source
        args.model, args.checkpoint, args.num_classes = source, '', None
        model = load_network(args) if args.data_dir or args.time else None
        if args.data_dir:
            require_writable(Path(args.output) / COMPARISON_NAME)
            splits = open_data(args, model)
            logits = (split_logits(args, model, splits, 'development'), split_logits(args, model, splits, 'test'),
                      exit_costs(model), splits.dataset)
        else:
            if ':' not in source:
                check_name(source)
            path = stored_path(source, RESULTS_NAME)
            if not path.is_file():
                raise InputError(f"no results are stored with '{source}': pass --data-dir to evaluate it now")
    if logits is None:
        results = [_stored(args, path)]
    else:
        *images_and_costs, dataset = logits
        results = [replace(evaluate(*images_and_costs, measure=m)[0], model=name, dataset=dataset)
                   for m in args.measure]
    name = name or results[0].model or source
    profile = measure_profile(make_engine(model, args.engine), results[0].input_size) if args.time else None
    return [Entry(name, (r,), () if profile is None else (time_budgets(r, profile),)) for r in results]


def _stored(args: argparse.Namespace, path: Path) -> Results:
    results = Results.load(path)
    if args.measure not in (['max_softmax'], [results.measure]):
        raise InputError(f"'{path}' holds results of {results.measure} alone: for other rules pass --data-dir, or "
                         'logits in a .npz file')
    return results


def run(args: argparse.Namespace) -> None:
    require_extra('plots', 'compare')
    twice = [name for i, name in enumerate(args.networks) if name in args.networks[:i]]
    if twice:
        raise InputError(f"'{twice[0]}' is given twice")
    measured = [measure(args, given) for given in args.networks]
    for i, (given, (first, *_)) in enumerate(zip(args.networks, measured)):
        if not given.startswith(f'{first.network}=') and first.network in [e[0].network for e in measured[:i]]:
            raise InputError(f"two networks are called '{first.network}': give each a name, NAME={given}, the same for "
                             'runs of one')
    entries = joined_runs([entry for same in measured for entry in same])
    check_comparable(entries)
    print_comparison(entries)
    paths = write_comparison(entries, Path(args.output))
    print('written: ' + ', '.join(map(str, paths)))


def print_comparison(entries: Sequence[Entry]) -> None:
    first = entries[0].results
    print(f'{first.test_images:,} test images{f" of {first.dataset}" if first.dataset else ""}\n')
    _print_table('accuracy at the same average MACs', entries, comparison_rows(entries))
    if all(entry.milliseconds for entry in entries):
        _print_table('accuracy at the same average milliseconds', entries, comparison_rows(entries, True))
    if any(len(entry.runs) > 1 for entry in entries):
        print('±: standard deviation over the runs; where there is none, of a single run\n')
    for other in entries[1:]:
        rows = saved(entries[0], other)
        if not rows:
            print(f'{entries[0].name} and {other.name} reach no accuracy, in steps of 0.5 %, in common\n')
            continue
        print(f'average MACs for the same accuracy: {entries[0].name} against {other.name}')
        for row in rows[-6:]:
            less = f"{1 - row['share']:.0%} fewer" if row['share'] <= 1 else f"{row['share'] - 1:.0%} more"
            print(f"{row['accuracy']:>7.1f} %  {format_macs(row['own']):>9}  {format_macs(row['its']):>9}  {less}")
        print()


def _print_table(title: str, entries: Sequence[Entry], rows: List[dict]) -> None:
    width = max(len(entry.name) for entry in entries)
    heads = [f"{row['ms']:.2f} ms" if 'ms' in row else format_macs(row['macs']) for row in rows]
    print(title + '\n' + ' ' * width + ''.join(f'{head:>10}' for head in heads))
    for entry in entries:
        for label, key, sign in ((entry.name, entry.name, ''), ('', entry.name + DEVIATION, '±')):
            if key in rows[0]:
                cells = ('' if row[key] is None else f'{sign}{row[key]:.2f}' for row in rows)
                print(f'{label:<{width}}' + ''.join(f'{cell:>10}' for cell in cells))
    print()
