"""`timm-multiexit calibrate MODEL`: temperatures and scores of held-out images, from which policies are solved."""
import argparse
from dataclasses import replace
from pathlib import Path
from typing import Sequence

import numpy as np

from ..data.images import Images
from ..data.splits import Split, Splits, certification_split
from ..errors import InputError
from ..evaluation.evaluate import exit_logits
from ..files import require_writable
from ..inference.preprocess import Preprocessing
from ..models import MultiExitNet, exit_costs
from ..pretrained.exit_config import exit_config_of, weights_digest
from ..pretrained.names import class_labels
from ..stopping.config import FILE_NAME, SCORES_NAME, ExitConfig, scores_path
from ..stopping.costs import format_macs
from ..stopping.policy import CALIBRATE_HINT, MEASURES
from ..stopping.scores import UNKNOWN, ExitScores
from ._common import add_model_argument, add_model_options, load_network, weights_folder
from .evaluate import add_data_options, prepare, split_logits

FEW_IMAGES = 50


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        'calibrate', help='temperatures and scores of held-out images, for a checkpoint',
        description=f'Fits temperatures on validation images and keeps the scores of all exits; writes {FILE_NAME} and '
                    f'{SCORES_NAME} beside the weights, from which every command solves the policy asked for. With '
                    '--certify, also the scores of images kept for the guarantee of --max-loss alone.')
    add_model_argument(parser)
    add_model_options(parser)
    add_data_options(parser)
    parser.add_argument('--certify', default='', metavar='DIR',
                        help='images for the guarantee, in folders named after their classes; without such folders '
                             'only the risk "consistency" can be bounded. Use them for nothing else')
    parser.add_argument('--output', metavar='FILE', default='', help=f'default: {FILE_NAME} beside the weights')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    if not args.output and not args.checkpoint and not args.model.startswith('local-dir:'):
        raise InputError(f'calibrate writes {FILE_NAME} beside --checkpoint PATH: pass that, or --output FILE')
    if not args.data_dir and not args.certify:
        raise InputError('nothing to calibrate on: pass --data-dir with the data set, or --certify with images')
    model, splits = prepare(args) if args.data_dir else (load_network(args), None)
    output = Path(args.output or Path(weights_folder(args)) / FILE_NAME)
    require_writable(output)
    if splits is not None:
        config = fit(args, model, splits)
    else:  # what is stored, with other certification images
        config = exit_config_of(model, args.model, args.checkpoint)
        if config.scores is None:
            raise InputError(f'no scores are stored with these weights: {CALIBRATE_HINT}')
        if args.measure not in (None, config.measure):
            raise InputError(f'the stored scores are of {config.measure}: --measure {args.measure} needs --data-dir')
        config = replace(config, scores=config.scores.development)
    if args.certify:
        split = certification_split(args.certify, class_labels(model, config.class_names))
        config = replace(config, scores=config.scores.joined(certification_scores(args, model, config, split)))
    config.save(output)
    print_config(config)
    print(f'written: {output}, {scores_path(output)}')


def fit(args: argparse.Namespace, model: MultiExitNet, splits: Splits) -> ExitConfig:
    """The exit config of the images that the network's run held out for choices and for a guarantee."""
    validation = split_logits(args, model, splits, 'development')
    config = ExitConfig.fit(
        validation.logits, validation.targets, exit_costs(model), splits.classes, args.measure or MEASURES[0],
        weights=weights_digest(model))
    if len(splits.certification) and not args.certify:
        kept = certification_scores(args, model, config, splits.certification)
        config = replace(config, scores=config.scores.joined(kept))
    return config


def certification_scores(
        args: argparse.Namespace,
        model: MultiExitNet,
        config: ExitConfig,
        split: Split,
) -> ExitScores:
    images = Images(split, Preprocessing.of(model), args.batch_size, 'certify')
    kept = exit_logits(model, images, args.device, unknown=True)
    certification = np.ones(len(kept.targets), bool)
    return ExitScores.from_logits(kept.logits, kept.targets, config.temperatures, config.measure, certification)


def print_config(config: ExitConfig) -> None:
    held, kept = config.scores.development, config.scores.for_certification
    print(f'scores of {held.num_images:,} validation and {kept.num_images:,} certification images')
    if held.num_images < FEW_IMAGES:
        print(f'note: {held.num_images} images are few: budgets and accuracies may be far off on others')
    print_missing(config, held.labels)
    unknown = int((kept.labels == UNKNOWN).sum())
    if unknown:
        print(f"note: {unknown:,} certification images lie in no class folder: risk 'consistency' only")
    print(f"policies solved from them, for example:\n{'expected':>9} {'top-1':>6}  share leaving at each exit")
    for p in config.policies(11).values():
        shares = ' '.join(f'{100 * s:.0f}%' for s in p.exit_shares)
        accuracy = '' if p.expected_accuracy is None else f'{p.expected_accuracy:.2f}'
        print(f'{format_macs(p.expected_macs):>9} {accuracy:>6}  {shares}')


def print_missing(config: ExitConfig, labels: Sequence[int]) -> None:
    names, there = config.class_names or (), set(labels)
    missing = [name for i, name in enumerate(names) if i not in there]
    if missing:
        print(f"note: no validation image of {', '.join(missing[:5])}{' and others' * (len(missing) > 5)}")
