"""`timm-multiexit serve DIR`: answers images over HTTP with an exported folder, in batches at every segment."""
import argparse
from pathlib import Path

from ..commands import COUNT, Number
from ..inference.device import FolderEngine, add_stop_options, policy_of
from ..optional import require_extra
from ..stopping.config import FILE_NAME, ExitConfig


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        'serve', help='answer images over HTTP',
        description='Serves a folder that export wrote: POST /classify takes an image, or a form with several, and '
                    'answers in JSON; GET /health, GET /metrics (Prometheus). Images that go on after an exit form new '
                    'batches with those of other callers.')
    parser.add_argument('folder', metavar='DIR', help='what export --output wrote')
    add_stop_options(parser)
    parser.add_argument('--host', default='127.0.0.1', help='0.0.0.0 for all of the network (default: %(default)s)')
    parser.add_argument('--port', type=Number(int, 1, 65535), default=8000, help='default: %(default)s')
    parser.add_argument('--batch-size', type=COUNT, default=32, metavar='N',
                        help='images that run together at most (default: %(default)s)')
    parser.add_argument('--queue', type=COUNT, default=1024, metavar='N',
                        help='images decoded, waiting and running at most, then status 503 (default: %(default)s)')
    parser.add_argument('--max-bytes', type=COUNT, default=20_000_000, metavar='N',
                        help='of a request, then status 413 (default: %(default)s)')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    require_extra('serve', 'serve')
    import uvicorn

    from ..inference.server import make_app
    engine, config = FolderEngine(Path(args.folder)), ExitConfig.load(Path(args.folder) / FILE_NAME)
    app = make_app(engine, config, policy_of(args, config, engine), args.batch_size, args.queue, args.max_bytes)
    print(f'http://{args.host}:{args.port}/classify', flush=True)
    uvicorn.run(app, host=args.host, port=args.port, log_level='warning', timeout_graceful_shutdown=5)
