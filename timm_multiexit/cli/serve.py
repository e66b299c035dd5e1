"""`timm-multiexit serve DIR`: answers images over HTTP with an exported folder, in batches at every segment."""
import argparse
import os
import socket
from contextlib import suppress
from typing import Any, List

from ..commands import COUNT, Interruptions, Number
from ..errors import InputError
from ..inference.device import add_stop_options, open_folder, policy_of
from ..optional import require_extra
from ..stopping.config import ExitConfig


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        'serve', help='classify images over HTTP, with an exported folder',
        description='Serves a folder that export wrote: POST /classify takes an image, or a form with several, and '
                    'answers in JSON; GET /health, GET /metrics (Prometheus). Images that go on after an exit form new '
                    'batches with those of other callers.')
    parser.add_argument('folder', metavar='DIR', help='what export --output wrote')
    add_stop_options(parser)
    parser.add_argument('--host', default='127.0.0.1', help='0.0.0.0 listens on all interfaces (default: %(default)s)')
    parser.add_argument('--port', type=Number(int, 1, 65535), default=8000, help='default: %(default)s')
    parser.add_argument('--batch-size', type=COUNT, default=32, metavar='N',
                        help='largest batch (default: %(default)s)')
    parser.add_argument('--queue', type=COUNT, default=1024, metavar='N',
                        help='most images in flight; above it requests get status 503 (default: %(default)s)')
    parser.add_argument('--max-bytes', type=COUNT, default=20_000_000, metavar='N',
                        help='largest request; above it status 413 (default: %(default)s)')
    parser.add_argument('--ray', action='store_true',
                        help='run the network in processes of Ray Serve on this machine, or on the cluster at '
                             'RAY_ADDRESS, whose machines need DIR at the same path')
    parser.add_argument('--replicas', type=replicas, metavar='N[,N...]',
                        help='with --ray: copies of the network, or N,N,...: of each group of its segments (default: a '
                             'copy of the network on each CPU)')
    parser.set_defaults(run=run)


def replicas(text: str) -> List[int]:
    """The type of an option that takes counts with commas between."""
    return [int(COUNT(part)) for part in text.split(',')]


def run(args: argparse.Namespace) -> None:
    require_extra(*(('ray', 'serve --ray') if args.ray else ('serve', 'serve')))
    from ..inference.segment_queues import SegmentQueues
    engine, config = open_folder(args.folder)
    policy = policy_of(args, config, engine)
    if args.replicas and not args.ray:
        raise InputError('--replicas goes with --ray')
    listener = listen(args.host, args.port)
    if not args.ray:
        answer(args, listener, SegmentQueues(engine, policy, args.batch_size, args.queue), config)
        return
    from ..inference.on_ray import RayQueues, connected
    with Interruptions(), connected() as cpus:
        counts = args.replicas or [cpus]
        if sum(counts) > cpus and not os.environ.get('RAY_ADDRESS'):  # a cluster may grow
            raise InputError(f'{sum(counts)} replicas need as many CPUs, Ray has {cpus}: give fewer --replicas')
        answer(args, listener, RayQueues(
            engine, policy, counts, args.batch_size, args.queue, f'timm-multiexit {args.port}'), config)


def listen(host: str, port: int) -> socket.socket:
    """A socket that accepts connections.

    Raises:
        InputError: it cannot be opened there.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ':' in host else socket.AF_INET)
    except OSError as error:
        raise InputError(f'cannot answer at {host}:{port} ({error.strerror or error}): choose another --port or '
                         '--host') from error


def answer(args: argparse.Namespace, listener: socket.socket, queues: Any, config: ExitConfig) -> None:
    """Answers requests until a signal ends it."""
    import uvicorn

    from ..inference.server import make_app
    try:
        app = make_app(queues, config, args.max_bytes)  # which closes the queues at its end
    except BaseException:
        queues.close()
        raise
    host = f'[{args.host}]' if ':' in args.host else args.host  # IPv6
    print(f'http://{host}:{args.port}/classify', flush=True)
    server = uvicorn.Server(uvicorn.Config(app, log_level='warning', timeout_graceful_shutdown=5))
    with suppress(KeyboardInterrupt):  # the server has ended when it passes a signal on
        server.run(sockets=[listener])
