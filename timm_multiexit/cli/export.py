"""`timm-multiexit export MODEL --output DIR`: a folder that runs with NumPy, Pillow and onnxruntime alone."""
import argparse

from ..optional import require_extra
from ._common import add_exit_config_option, add_model_argument, add_model_options, load_network, stored_exit_config


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        'export', help='a folder for devices without PyTorch',
        description='Writes an ONNX graph for each stage and each head, the exit config with its scores, and run.py, '
                    'which needs only numpy, pillow and onnxruntime and gives the answers of classify.')
    add_model_argument(parser)
    add_model_options(parser)
    add_exit_config_option(parser)
    parser.add_argument('--output', required=True, metavar='DIR')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    require_extra('export', 'export')
    from ..inference.export import export_folder
    model = load_network(args)
    graphs = export_folder(model, stored_exit_config(args, model), args.output)
    size = sum(path.stat().st_size for path in graphs) / 1e6
    print(f'written: {args.output}, {len(graphs)} graphs, {size:.1f} MB; run it: python {args.output}/run.py IMAGE')
