"""`timm-multiexit evaluate MODEL --data-dir D`: accuracy of each exit and under average budgets, on the test set."""
import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

import torch

from .. import __version__
from ..commands import COUNT
from ..data.images import Images
from ..data.splits import Splits
from ..errors import InputError
from ..evaluation.classes import (
    CLASSES_NAME,
    ClassResult,
    balanced_accuracy,
    class_results,
    most_confused,
    write_classes,
)
from ..evaluation.evaluate import LabelledLogits, evaluate, exit_logits, write_report
from ..evaluation.guarantee_check import CERTAINTY, SPLITS, GuaranteeCheck, check_guarantees
from ..evaluation.logits_file import LOGITS_HELP, SUFFIX, read_logits
from ..evaluation.results import RESULTS_NAME, Results
from ..files import require_writable
from ..inference.preprocess import Preprocessing
from ..models import MultiExitNet, exit_costs
from ..optional import require_extra
from ..pretrained.names import class_labels
from ..stopping.costs import ExitCosts, format_macs
from ..stopping.guarantee import RISKS
from ..stopping.policy import MEASURES
from ._common import add_model_argument, add_model_options, load_network, network_name, open_data, weights_folder

# More are in classes.csv only.
MAX_CLASSES_PRINTED = 20


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        'evaluate', help='accuracy of each exit and under average budgets',
        description='Measures every exit on the test set, and average budgets under thresholds from validation images. '
                    'Writes results.json, three CSV tables and two figures.')
    add_model_argument(parser, f'; or a {SUFFIX} file with {LOGITS_HELP}')
    add_model_options(parser)
    add_data_options(parser)
    parser.add_argument('--output', metavar='DIR', default='',
                        help='default: beside your own weights, else evaluation/MODEL')
    parser.add_argument('--guarantee', nargs='?', const='accuracy', choices=RISKS, metavar='RISK',
                        help=f'also check the bounds of --max-loss on {SPLITS} random splits of the test images: '
                             'certified on 2,000, at most half, checked on the rest; '
                             f"{', '.join(RISKS)} (default: accuracy)")
    parser.set_defaults(run=run)


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Options that name the images and the confidence measure."""
    add_image_options(parser)
    parser.add_argument('--batch-size', type=COUNT, default=256, metavar='N')
    parser.add_argument('--measure', choices=MEASURES, help=f'confidence measure (default: {MEASURES[0]})')


def add_image_options(parser: argparse.ArgumentParser, data_dir: str = 'folder of the data set') -> None:
    """Options that `open_data` reads; `data_dir` is the help of --data-dir."""
    parser.add_argument('--data-dir', default='', metavar='DIR', help=data_dir)
    parser.add_argument('--dataset', default='', metavar='NAME',
                        help="timm's name, like torch/cifar10 or folder (default: that of the weights)")
    parser.add_argument('--dataset-download', action='store_true', help='let torchvision download it')
    parser.add_argument('--validation-images', type=COUNT, default=None, metavar='N',
                        help='training images on which thresholds are set, held out as in train_timm.py (default: '
                             'those that the run held out)')


def prepare(args: argparse.Namespace) -> Tuple[MultiExitNet, Splits]:
    """The network and the images that the options name.

    Raises:
        InputError: options that cannot be used.
    """
    model = load_network(args)
    model = model.to(memory_format=torch.channels_last)
    return model, open_data(args, model)


def split_logits(args: argparse.Namespace, model: MultiExitNet, splits: Splits, name: str) -> LabelledLogits:
    """Logits of a split."""
    return exit_logits(model, Images(splits[name], Preprocessing.of(model), args.batch_size, name), args.device)


@dataclass(frozen=True)
class Measured:
    """Answers to evaluate, and what the report says of them.

    Attributes:
        validation: For temperatures and thresholds.
        test: For everything else.
        costs: Costs of the exits.
        about: Fields of `Results` that say what was measured.
        classes: Names of the classes.
        images: The test images in words.
        folder: Where the report goes.
    """

    validation: LabelledLogits
    test: LabelledLogits
    costs: ExitCosts
    about: Dict[str, Optional[str]]
    classes: Sequence[str]
    images: str
    folder: Path


def _of_network(args: argparse.Namespace) -> Measured:
    if not args.data_dir:
        raise InputError('nothing to evaluate on: pass --data-dir with the data set')
    model, splits = prepare(args)
    about = dict(model=network_name(args.model, model), dataset=splits.dataset,
                 checkpoint=Path(args.checkpoint).name or None)
    folder = Path(args.output or weights_folder(args) or Path('evaluation') / args.model.replace('/', '_'))
    require_writable(folder / RESULTS_NAME)
    return Measured(
        split_logits(args, model, splits, 'development'), split_logits(args, model, splits, 'test'), exit_costs(model),
        about, class_labels(model, splits.classes), splits.test.title, folder)


def _of_logits(args: argparse.Namespace) -> Measured:
    if args.data_dir or args.checkpoint:
        raise InputError(f"'{args.model}' holds the answers: leave out --data-dir and --checkpoint")
    path = Path(args.model)
    validation, test, costs, dataset = read_logits(path)
    return Measured(validation, test, costs, dict(model=path.stem, dataset=dataset),
                    [str(k) for k in range(test.logits.shape[2])], path.name,
                    Path(args.output or Path('evaluation') / path.stem))


def run(args: argparse.Namespace) -> None:
    require_extra('plots', 'evaluate')
    measured = (_of_logits if args.model.endswith(SUFFIX) else _of_network)(args)
    test, costs = measured.test, measured.costs
    results, config = evaluate(measured.validation, test, costs, measure=args.measure or MEASURES[0])
    results = replace(results, timm_multiexit=__version__, **measured.about)
    paths = write_report(results, measured.folder)
    print_results(results)
    rows = class_results(test.logits[-1].argmax(1), test.targets, measured.classes)
    paths.append(paths[0].with_name(CLASSES_NAME))
    write_classes(rows, paths[-1])
    print_classes(rows, measured.images)
    if args.guarantee:
        images = min(2000, len(test.targets) // 2)
        checks = check_guarantees(config.path(), test, costs, args.guarantee, images=images)
        print_guarantees(checks, args.guarantee, costs, images)
    print('written: ' + ', '.join(map(str, paths)))


def print_results(results: Results) -> None:
    images = f'{results.model}, {results.dataset}' if results.dataset else results.model
    print(f'{images}: {results.test_images:,} test images, thresholds from '
          f'{results.validation_images:,} validation images')
    print(f"{'exit':>4} {'MACs':>9} {'top-1':>6} {'calibration error':>18} {'with temperature':>17}")
    for e in results.exits:
        print(f'{e.exit:>4} {format_macs(e.macs):>9} {e.accuracy:>6.2f} {e.calibration_error:>17.2f}% '
              f'{e.calibration_error_with_temperature:>16.2f}%')
    best = results.oracle[-1]
    print(f'oracle that stops at the first correct exit: {best.accuracy:.2f} % at {format_macs(best.average_macs)}')
    print(f"\n{'budget':>9} | {'spent':>9} {'top-1':>6} | share leaving at each exit")
    for row in results.budgeted[::max(1, len(results.budgeted) // 10)]:
        shares = ' '.join(f'{100 * s:.0f}%' for s in row.exit_shares)
        print(f'{format_macs(row.budget):>9} | {format_macs(row.average_macs):>9} {row.accuracy:>6.2f} | {shares}')
    print(f'largest budget error {max(abs(row.over_budget) for row in results.budgeted):.2f} %')


def print_classes(rows: Sequence[ClassResult], measured_on: str) -> None:
    print(f'\nby class, last exit, on {measured_on}: balanced accuracy {balanced_accuracy(rows):.2f} %')
    if len(rows) <= MAX_CLASSES_PRINTED:
        width = max(len(row.name) for row in rows)
        for row in rows:
            print(f'{row.name:<{width}} {row.accuracy:>6.2f} % of {row.images:,}')
    for row in most_confused(rows):
        print(f'{row.taken:,} of {row.images:,} {row.name} taken for {row.taken_for}')


def print_guarantees(checks: List[GuaranteeCheck], risk: str, costs: ExitCosts, images: int) -> None:
    print(f'\nbound on the loss ({risk}), certainty {100 * CERTAINTY:.0f} %, if new images are like these: certified '
          f'on {images:,} test images, checked on the rest, {SPLITS} splits')
    print(f"{'at most':>8} {'exceeded':>10} {'by plug-in rule':>16} {'median cost':>12} {'of full':>8} {'none':>6}")
    for c in checks:
        print(f'{c.max_loss:>8.2f} {c.broken:>10.1%} {c.plug_in_broken:>16.1%} {format_macs(c.median_macs):>12} '
              f'{c.median_macs / costs.macs[-1]:>8.0%} {c.nothing:>6.1%}')
