"""Options that several subcommands share."""
import argparse

from ..models import MultiExitNet
from ..pretrained.load import load_model
from ..pretrained.names import require_weights


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Options that name weights and a device, as `pretrained.load.load_model` takes them."""
    parser.add_argument('--checkpoint', default='', metavar='FILE',
                        help='weights to use instead of the pretrained ones')
    parser.add_argument('--num-classes', type=int, default=None, metavar='N',
                        help='number of classes (default: that of the weights)')
    parser.add_argument('--device', default='cpu', help='torch device (default: %(default)s)')


def load_network(args: argparse.Namespace) -> MultiExitNet:
    """The network that `model` and the options of `add_model_options` name.

    Raises:
        InputError: as `load_model`; or it has no weights, without `--checkpoint`.
    """
    if not args.checkpoint:
        require_weights(args.model)
    return load_model(args.model, args.checkpoint, args.num_classes, args.device)
