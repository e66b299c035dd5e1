"""`timm-multiexit export MODEL`: a folder that runs with NumPy, Pillow and onnxruntime alone, or one ONNX file."""
import argparse

from ..optional import require_extra
from ._common import add_exit_config_option, add_model_argument, add_model_options, load_network, stored_exit_config


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        'export', help='for devices without PyTorch: a folder, or one ONNX file',
        description='Writes a folder with an ONNX graph for each stage and each head, the exit config with its scores, '
                    'and run.py, which needs only numpy, pillow and onnxruntime and gives the answers of classify; or '
                    'one ONNX file that stops by itself.')
    add_model_argument(parser)
    add_model_options(parser)
    add_exit_config_option(parser)
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument('--output', metavar='DIR', help='the folder to write')
    target.add_argument('--single-file', metavar='FILE',
                        help='the ONNX file to write: inputs image (one) and thresholds (one per early exit, of any '
                             'policy), outputs logits, exit and confidence')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    require_extra('export', 'export')
    from ..inference.export import export_folder
    from ..inference.single_file import export_single_file
    model = load_network(args)
    config = stored_exit_config(args, model)
    if args.single_file:
        export_single_file(model, config, args.single_file)
        print(f'written: {args.single_file}')
        return
    graphs = export_folder(model, config, args.output)
    size = sum(path.stat().st_size for path in graphs) / 1e6
    print(f'written: {args.output}, {len(graphs)} graphs, {size:.1f} MB; run it: python {args.output}/run.py IMAGE')
