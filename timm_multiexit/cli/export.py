"""`timm-multiexit export MODEL`: a folder that runs without PyTorch, one ONNX file, or a page for browsers."""
import argparse
import sys
from pathlib import Path
from typing import Sequence

from ..data.images import Images
from ..data.splits import certification_split
from ..errors import InputError
from ..inference.preprocess import Preprocessing
from ..models import MultiExitNet
from ..optional import require_extra
from ..pretrained.names import class_labels
from ..stopping.config import ExitConfig
from ._common import (
    add_exit_config_option,
    add_model_argument,
    add_model_options,
    load_network,
    network_name,
    open_data,
    stored_exit_config,
)
from .benchmark import default_amounts
from .evaluate import add_image_options

# With fewer held-out images, ranges and scores come from the same ones.
MIN_TO_DIVIDE = 64
NOTABLE_LOSS = 0.5
NOTABLE_GAIN = 1.05


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        'export', help='for devices without PyTorch: a folder, one ONNX file, or a web page',
        description='Writes a folder with an ONNX graph for each stage and each head, the exit config with its scores, '
                    'and run.py, which needs only numpy, pillow and onnxruntime and gives the answers of classify; or '
                    'one ONNX file that stops by itself; or a static page that runs that file in the browser.')
    add_model_argument(parser)
    add_model_options(parser)
    add_exit_config_option(parser)
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument('--output', metavar='DIR', help='the folder to write')
    target.add_argument('--single-file', metavar='FILE',
                        help='the ONNX file to write: inputs image (one) and thresholds (one per early exit, of any '
                             'policy), outputs logits, exit and confidence')
    target.add_argument('--web', metavar='DIR',
                        help='the page to write, for any static file server; npm downloads onnxruntime-web once')
    parser.add_argument('--onnxruntime-web', metavar='FILE', default='',
                        help='for --web: its .tgz file from npm, instead of downloading it')
    parser.add_argument('--average-budget', default='', metavar='MACS',
                        help='for --output: also merge the graphs between the exits that this budget evaluates, like '
                             '25M; up to a sixth faster under it, other budgets work as before')
    parser.add_argument('--int8', action='store_true',
                        help='the folder in int8, with scores computed anew from the held-out images of --data-dir')
    parser.add_argument('--vnni', action='store_true',
                        help='int8 for processors with VNNI or dot products only: weights of 8 bits in place of 7')
    add_image_options(parser, 'folder of the data set, for --int8')
    parser.add_argument('--certify', default='', metavar='DIR',
                        help='for --int8: images for --max-loss, as for calibrate; int8 has scores of its own')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    require_extra('export', 'export')
    if args.int8 and not (args.output and args.data_dir):
        raise InputError('--int8 needs --output DIR, and --data-dir with the data set, for ranges and scores')
    if args.vnni and not args.int8:
        raise InputError('--vnni is an option of --int8: give both')
    if args.average_budget and (args.int8 or not args.output):
        raise InputError('--average-budget needs --output and excludes --int8')
    if args.certify and not args.int8:
        raise InputError('--certify is an option of --int8: other folders take the scores of --exit-config')
    model = load_network(args)
    config = stored_exit_config(args, model)
    if args.single_file:
        from ..inference.single_file import export_single_file
        export_single_file(model, config, args.single_file)
        print(f'written: {args.single_file}')
        return
    if args.web:
        from ..inference.web_page import export_web
        export_web(model, config, args.web, network_name(args.model, model), args.onnxruntime_web)
        print(f'written: {args.web}; serve it: python -m http.server --directory {args.web}')
        return
    if args.int8:
        graphs = quantize(args, model, config)
    else:
        from ..inference.export import export_folder
        graphs = export_folder(
            model, config, args.output, config.policy_for(args.average_budget) if args.average_budget else None)
    size = sum(path.stat().st_size for path in graphs) / 1e6
    print(f'written: {args.output}, {len(graphs)} graphs, {size:.1f} MB; run it: python {args.output}/run.py IMAGE')


def quantize(args: argparse.Namespace, model: MultiExitNet, config: ExitConfig) -> Sequence[Path]:
    """Writes the folder in int8 and prints what that changed; returns the graphs."""
    from ..inference.device import processor
    from ..inference.quantize import RANGE_IMAGES, HeldOut, export_int8_folder
    splits = open_data(args, model)
    for_ranges = for_scores = splits['development']
    if len(for_scores) >= MIN_TO_DIVIDE:
        for_ranges, for_scores = for_scores.divided(min(RANGE_IMAGES, len(for_scores) // 4))
    else:
        print(f'note: {len(for_scores)} held-out images are few: they set ranges and scores at once', file=sys.stderr)
    certification = splits.certification
    if args.certify:
        certification = certification_split(args.certify, class_labels(model, config.class_names))
    elif config.scores is not None and config.scores.for_certification.num_images and not len(certification):
        print('note: for --max-loss from this folder, give --certify with the images that calibrate --certify had',
              file=sys.stderr)
    preprocess, (_, batch_size) = Preprocessing.of(model), default_amounts(config.exit_macs[-1])
    report = export_int8_folder(
        model, config, args.output, HeldOut(
            Images(for_ranges, preprocess, batch_size), Images(for_scores, preprocess, batch_size, 'scores'),
            Images(certification, preprocess, batch_size, 'certification') if len(certification) else None),
        args.vnni, (1, batch_size))
    print(f'accuracy on {report.images:,} held-out images; ranges are of {len(for_ranges)} '
          f"{'others' if for_ranges is not for_scores else 'of them'}\nexit  float32   int8")
    for k, (before, after) in enumerate(report.accuracies, 1):
        lost = before - after > NOTABLE_LOSS
        print(f'{k:>4} {before:>8.2f} {after:>6.2f}{f"  loses over {NOTABLE_LOSS} points" if lost else ""}')
    print(f'time to the last exit on {processor()}, one thread, in milliseconds per image')
    for size, (before, after) in report.times.items():
        gain = f'{before / after:.1f} times faster' if before > NOTABLE_GAIN * after else (
            'nothing gained: this processor, or this runtime, is no faster in int8')
        print(f'batches of {size}: float32 {before:.2f}, int8 {after:.2f}, {gain}')
    return report.graphs
