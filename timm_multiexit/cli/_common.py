"""Options that several subcommands share."""
import argparse
from pathlib import Path

from ..models import MultiExitNet
from ..pretrained.load import load_model
from ..pretrained.names import require_weights
from ..pretrained.record import find_weights


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """The positional `model`, which a checkpoint with a record replaces."""
    parser.add_argument('model', nargs='?', default='',
                        help='name in the registry, hf-hub:... or local-dir:...; not needed with --checkpoint FOLDER')


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Options that name weights and a device, as `pretrained.load.load_model` takes them."""
    parser.add_argument('--checkpoint', default='', metavar='PATH',
                        help='weights to use instead of the pretrained ones: final/ of a run, which is enough alone, '
                             'or a file')
    parser.add_argument('--num-classes', type=int, default=None, metavar='N',
                        help='number of classes, only for weights without a config.json beside them')
    parser.add_argument('--device', default='cpu', help='torch device (default: %(default)s)')


def load_network(args: argparse.Namespace) -> MultiExitNet:
    """The network that `model` and the options of `add_model_options` name; afterwards they say where it was found.

    Raises:
        InputError: as `load_model`; or it has no weights, without `--checkpoint`.
    """
    args.model, args.checkpoint = find_weights(args.model, args.checkpoint)
    if not args.checkpoint:
        require_weights(args.model)
    return load_model(args.model, args.checkpoint, args.num_classes, args.device)


def weights_folder(args: argparse.Namespace) -> str:
    """Folder of a user's own weights after `load_network`, '' for weights of the package or the Hub."""
    source, _, place = args.model.partition(':')
    if args.checkpoint:
        return str(Path(args.checkpoint).parent)
    return place if source == 'local-dir' else ''


def network_name(name: str, model: MultiExitNet) -> str:
    """Name of a network in reports: without paths of this machine."""
    return model.pretrained_cfg['architecture'] if name.startswith('local-dir:') else name
