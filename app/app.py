"""The app: see a network make up its mind, exit by exit.

    python app/app.py [--model MODEL] [--port N] [--share] [--mcp]

The network runs once for each image, in `served`. The outputs of all exits are kept per visitor in `gr.State`; moving a
slider only picks another exit from them. Visitors share the networks and stored results, which are never modified.
"""
import importlib.util
import os
import sys
from typing import Any, Dict, Optional, Sequence

os.environ.setdefault('GRADIO_ANALYTICS_ENABLED', 'False')  # no network access, no tracking

if importlib.util.find_spec('gradio') is None:
    sys.exit("the app needs gradio: pip install 'timm-multiexit[app]'")

from handlers import run_example  # noqa: E402 - gradio must see the setting above
from layout import STYLE, build_page, theme  # noqa: E402
from served import available_networks  # noqa: E402

from timm_multiexit import InputError  # noqa: E402
from timm_multiexit.commands import Parser  # noqa: E402
from timm_multiexit.errors import run_command  # noqa: E402


def launch_options() -> Dict[str, Any]:
    """Arguments of `launch` for the page's look and behaviour."""
    # In the head, because gradio rewrites css= and drops container queries.
    return dict(
        theme=theme(), head=f'<style>{STYLE.read_text(encoding="utf-8")}</style>', show_error=True, ssr_mode=False,
        footer_links=['api', 'settings'], max_file_size='20mb', state_session_capacity=500)


def run(argv: Sequence[str]) -> None:
    """Serves the page until it is interrupted."""
    parser = Parser(
        prog='app.py', description='Serves a page that shows a multi-exit network decide, exit by exit.')
    parser.add_argument('--model', default='msfuse_cifar',
                        help='network to show first: a registered name, hf-hub:... or local-dir:... (default: '
                             '%(default)s)')
    parser.add_argument('--port', type=int, help='port to listen on (default: the first free port from 7860)')
    parser.add_argument('--share', action='store_true', help='also open a public link through gradio.live')
    parser.add_argument('--mcp', action='store_true', help='also serve the API as tools over MCP')
    args = parser.parse_args(argv)
    if args.mcp and importlib.util.find_spec('mcp') is None:
        # gradio would start without it and say nothing.
        raise InputError("--mcp needs an extra package: pip install 'gradio[mcp]'")
    names = available_networks(args.model)
    run_example(names[0], 0)  # load it before the first visitor arrives
    page = build_page(names).queue(max_size=200)
    try:
        page.launch(server_port=args.port, share=args.share, mcp_server=args.mcp, **launch_options())
    except OSError as error:  # the port is taken
        raise InputError(str(error)) from error


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs the command; returns the status of `run_command`."""
    return run_command('app.py', run, argv)


if __name__ == '__main__':
    sys.exit(main())
