"""Options that several subcommands share."""
import argparse
import sys
from pathlib import Path
from typing import Optional

from ..commands import COUNT, POSITIVE, device
from ..data.splits import Splits, open_splits
from ..datasets import VALIDATION_IMAGES
from ..errors import InputError
from ..models import MultiExitNet
from ..pretrained.exit_config import exit_config_of, load_recipe, weights_digest
from ..pretrained.load import load_model
from ..pretrained.names import require_weights
from ..pretrained.record import find_weights, trained_on, training_data
from ..stopping.config import ExitConfig
from ..stopping.costs import StageCosts
from ..stopping.guarantee import RISKS
from ..stopping.policy import ExitPolicy


def add_model_argument(parser: argparse.ArgumentParser, instead: str = '') -> None:
    """The positional `model`, which a checkpoint with a record replaces; `instead`: what else it may be."""
    parser.add_argument('model', nargs='?', default='',
                        help='name in the registry, hf-hub:... or local-dir:...; not needed with --checkpoint FOLDER'
                             f'{instead}')


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Options that name weights and a device, as `pretrained.load.load_model` takes them."""
    parser.add_argument('--checkpoint', default='', metavar='PATH',
                        help='weights to use instead of the pretrained ones: final/ of a run, which names its network, '
                             'or a file')
    parser.add_argument('--num-classes', type=COUNT, default=None, metavar='N',
                        help='number of classes, only for weights without a config.json beside them')
    parser.add_argument('--device', type=device, default='cpu', help='torch device (default: %(default)s)')


def load_network(args: argparse.Namespace) -> MultiExitNet:
    """The network that `model` and the options of `add_model_options` name; afterwards they say where it was found.

    Raises:
        InputError: as `load_model`; or it has no weights, without `--checkpoint`.
    """
    args.model, args.checkpoint = find_weights(args.model, args.checkpoint)
    if not args.checkpoint:
        require_weights(args.model)
    return load_model(args.model, args.checkpoint, args.num_classes, args.device)


def open_data(args: argparse.Namespace, model: MultiExitNet) -> Splits:
    """The images that `data_dir` and `dataset` name, with the classes of a network and as its run held them out.

    Raises:
        InputError: no such images, or other classes.
    """
    data = training_data(model)
    dataset = args.dataset or trained_on(model)
    same, held_out = dataset == data.dataset, data.held_out
    if same and not held_out:  # the package's weights have no record but their recipe
        recipe = load_recipe(args.model, args.checkpoint)
        held_out = {'from': 'training images',
                    'development': recipe.get('validation_images', VALIDATION_IMAGES),
                    'certification': recipe.get('certification_images') or 0}
    names = model.pretrained_cfg.get('label_names')
    splits = open_splits(
        dataset, args.data_dir, names if names and len(names) == model.num_classes else None,
        getattr(args, 'validation_images', None), held_out=held_out if same else None,
        download=getattr(args, 'dataset_download', False))
    if splits.classes and len(splits.classes) != model.num_classes:
        raise InputError(f"'{args.data_dir}' holds {len(splits.classes)} classes, the network knows "
                         f'{model.num_classes}: give the images that it was trained on')
    for note in splits.notes:
        print(f'note: {note}', file=sys.stderr)
    return splits


def weights_folder(args: argparse.Namespace) -> str:
    """Folder of a user's own weights after `load_network`, '' for weights of the package or the Hub."""
    source, _, place = args.model.partition(':')
    if args.checkpoint:
        return str(Path(args.checkpoint).parent)
    return place if source == 'local-dir' else ''


def network_name(name: str, model: MultiExitNet) -> str:
    """Name of a network in reports: without paths of this machine."""
    return model.pretrained_cfg['architecture'] if name.startswith('local-dir:') else name


def add_exit_config_option(parser: argparse.ArgumentParser) -> None:
    """The option that `stored_exit_config` reads."""
    parser.add_argument('--exit-config', default='', metavar='FILE',
                        help='what calibrate wrote, to use instead of what is stored with the weights')


def add_budget_options(group, parser: argparse.ArgumentParser, **kwargs) -> None:
    """Options that ask for a policy, in a group of which one is given, and what belongs to them."""
    group.add_argument('--average-budget', metavar='MACS', **kwargs,
                       help='average multiply-adds per image, like 30M')
    group.add_argument('--average-latency', metavar='MS', **kwargs,
                       help="average milliseconds per image on this machine, like 2ms, or a share of the full "
                            "network's, like 50%%")
    group.add_argument('--max-loss', type=POSITIVE, metavar='POINTS', **kwargs,
                       help='the cheapest policy that is guaranteed to lose at most this many points of accuracy '
                            'against the full network (needs calibrate --certify)')
    add_exit_config_option(parser)
    parser.add_argument('--certainty', type=float, default=0.95, metavar='P',
                        help='probability that --max-loss holds, over the draw of the certification images (default: '
                             '%(default)s)')
    parser.add_argument('--risk', choices=RISKS, default='accuracy',
                        help='what --max-loss bounds: accuracy, its net loss; harm, images that only the full network '
                             'gets right; consistency, answers that differ (default: %(default)s)')


def stored_exit_config(args: argparse.Namespace, model: MultiExitNet) -> ExitConfig:
    """The exit config of --exit-config, or that stored with the weights, checked to be of this network.

    Raises:
        InputError: there is none, or it is of another network.
    """
    if not args.exit_config:
        return exit_config_of(model, args.model, args.checkpoint)
    config = ExitConfig.load(args.exit_config)
    config.check_network(model, weights_digest(model))
    return config


def asks_for_policy(args: argparse.Namespace) -> bool:
    """Whether one option of `add_budget_options` is given."""
    return any(x not in (None, []) for x in (args.average_budget, args.average_latency, args.max_loss))


def requested_policy(args: argparse.Namespace, config: ExitConfig, profile: Optional[StageCosts]) -> ExitPolicy:
    """The policy for one option of `add_budget_options`; --average-latency needs the profile.

    Raises:
        InputError: a budget that cannot be kept or a promise that cannot be made.
    """
    if args.average_budget is not None:
        return config.policy_for(args.average_budget)
    if args.average_latency is not None:
        return config.policy_for(average_ms=args.average_latency, profile=profile)
    return config.policy_for(max_loss=args.max_loss, certainty=args.certainty, risk=args.risk)
