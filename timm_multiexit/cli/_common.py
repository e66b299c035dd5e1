"""Options that several subcommands share."""
import argparse


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Options that name weights and a device, as `pretrained.load.load_model` takes them."""
    parser.add_argument('--checkpoint', default='', metavar='FILE',
                        help='weights to use instead of the pretrained ones')
    parser.add_argument('--num-classes', type=int, default=None, metavar='N',
                        help='number of classes (default: that of the weights)')
    parser.add_argument('--device', default='cpu', help='torch device (default: %(default)s)')
