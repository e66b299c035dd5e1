"""`timm-multiexit predict DIR SOURCE...`: answers to many images as Parquet files, with an exported folder."""
import argparse
import signal
from pathlib import Path

import torch

from ..commands import COUNT, Interruptions
from ..errors import InputError
from ..files import held
from ..inference.device import add_stop_options, open_folder, policy_of
from ..optional import require_extra

STOP_OPTIONS = ('average_budget', 'average_latency', 'max_loss', 'confidence', 'budget')


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        'predict', help='classify many images into Parquet files, with an exported folder',
        description='Classifies all images of a source with a folder that export wrote. OUTPUT becomes a folder of '
                    'Parquet files with the columns path, label, class_name, confidence, exit, macs and error. After a '
                    'kill, run the same command to resume. OMP_NUM_THREADS sets the number of threads.')
    parser.add_argument('folder', metavar='DIR', help='what export --output wrote')
    parser.add_argument('sources', nargs='+', metavar='SOURCE',
                        help='a folder (with its subfolders), a list of paths (.txt, one per line), .tar shards of '
                             "WebDataset, .parquet files (column image: bytes, or Hugging Face's struct; path)")
    parser.add_argument('--output', required=True, metavar='OUTPUT', help='the folder to write or to continue')
    add_stop_options(parser)
    parser.add_argument('--part-size', type=COUNT, default=10_000, metavar='N',
                        help='images in one Parquet file; a kill loses at most one file (default: %(default)s)')
    parser.add_argument('--batch-size', type=COUNT, default=64, metavar='N',
                        help='images in a batch (default: %(default)s)')
    parser.add_argument('--ray', action='store_true',
                        help='share the parts among processes of this machine, or of the cluster at RAY_ADDRESS, whose '
                             'machines need DIR, SOURCE and OUTPUT at the same paths')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    require_extra(*(('ray', 'predict --ray') if args.ray else ('predict', 'predict')))
    from ..inference.predict import check_output, policy_on_record, predict, summary
    from ..inference.sources import open_sources
    engine, config = open_folder(args.folder)
    output = Path(args.output)
    stop = {name: value for name in STOP_OPTIONS if (value := getattr(args, name)) is not None}
    if 'max_loss' in stop:
        stop.update(certainty=args.certainty, risk=args.risk)
    check_output(output)
    with Interruptions():
        try:
            sources = open_sources(args.sources)
            with held(output):
                policy = policy_on_record(
                    output, engine, sources, stop, args.part_size, lambda: policy_of(args, config, engine))
                if args.ray:
                    from ..inference.on_ray import connected, predict_on_ray
                    with connected() as cpus:
                        predict_on_ray(engine, config, policy, sources, output, args.part_size, args.batch_size, cpus)
                else:
                    predict(engine, config, policy, sources, output, args.part_size, args.batch_size,
                            torch.get_num_threads())
        except KeyboardInterrupt as interrupt:
            number = interrupt.args[0]
            raise KeyboardInterrupt(
                number, f'stopped by {signal.Signals(number).name}: run the same command to resume') from None
    if not any(output.glob('part-*.parquet')):
        raise InputError(f"no images found in {', '.join(args.sources)}: give others")
    print(f'{output}: {summary(output)}')
