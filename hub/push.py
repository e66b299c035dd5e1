"""Publishes trained networks and the app on the Hugging Face Hub.

    python hub/push.py                                     # every network with weights in the package
    python hub/push.py msfuse_cifar.cifar10 --dry-run      # what would be sent
    python hub/push.py RUNS/mine/final --name msfuse_cifar.mine --org me    # your own run
    python hub/push.py --space                             # the app

Each repository is built in a temporary folder, loaded from there and compared, uploaded in one commit, then loaded from
the Hub and compared again. If nothing changed, no commit is made. The token is huggingface_hub's: `hf auth login` or
HF_TOKEN.
"""
import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Optional, Sequence

from huggingface_hub import HfApi, get_token
from model_repo import ORGANISATION, Network, read_network
from publication import build_folder, check_folder
from space_repo import SPACE, build_space, check_space
from upload import Target, check_private, compare, remote_files, send, verify_files, verify_network

from timm_multiexit import InputError, __version__, list_networks
from timm_multiexit.commands import Parser
from timm_multiexit.errors import run_command
from timm_multiexit.optional import require_timm
from timm_multiexit.pretrained.hub_files import HUB_ERRORS, explain


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog='push.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('models', nargs='*', metavar='MODEL',
                        help='arch.tag of the package, or the folder final/ of a run, once calibrated and evaluated '
                             '(default: all in the package)')
    parser.add_argument('--org', default=ORGANISATION, metavar='O', help='organisation or user (default: %(default)s)')
    parser.add_argument('--name', default='', metavar='ARCH.TAG',
                        help='repository name for a folder (default: architecture and data set of the recipe; for '
                             'weights of class folders it must be given)')
    parser.add_argument('--with-images', action='store_true',
                        help='also send the images that app/tools/choose_examples.py chose from the data set')
    parser.add_argument('--space', action='store_true', help='push the app, and networks only if named')
    parser.add_argument('--dry-run', action='store_true', help='show what would be uploaded, upload nothing')
    parser.add_argument('--revision', default=None, metavar='R', help='branch, created if missing (default: main)')
    parser.add_argument('--private', action='store_true', help='create repositories as private')
    args = parser.parse_args(argv)
    folders = [Path(model).is_dir() for model in args.models]
    if args.name and folders != [True]:
        parser.error('--name needs exactly one MODEL, a folder; networks of the package keep their names')
    if args.with_images and not (folders and all(folders)):
        parser.error('--with-images needs MODEL to be a folder: the app has images for the networks of the package')
    return args


def show_plan(api: HfApi, target: Target, folder: Path) -> None:
    """Prints what a push would do: the action, bytes, SHA-256 and path of each file."""
    note, remote = '', {}
    try:
        commit, remote = remote_files(api, target)
        note = f'at commit {commit[:12]}' if commit else 'does not exist yet'
    except HUB_ERRORS as error:
        note = f'not compared: {explain(error)}'
    changes = compare(folder, remote)
    print(f'{target.repo_type} {target} ({note})')
    for c in changes:
        print(f"  {c.action:<8}{c.size:>12,}  {c.digest or '-':<64}  {c.path}")
    sent = [c for c in changes if c.action in ('add', 'replace')]
    changed = any(c.action not in ('keep', 'leave') for c in changes)
    print(f"  to upload: {len(sent)} files, {sum(c.size for c in sent):,} bytes"
          f"{' in one commit' if changed else '; no change, no commit'}")


def push(args: argparse.Namespace, api: HfApi, folder: Path, note: str, network: Optional[Network] = None) -> None:
    """Uploads a checked folder, a network's or else the Space's, to the repository of its name, then verifies that.

    `note` is what the check has to tell.
    """
    if note:
        print(f'push.py: note: {note}', file=sys.stderr)
    check_private(folder, args.org)
    target = Target(f'{args.org}/{folder.name}', 'model' if network else 'space', args.revision, args.private)
    if args.dry_run:
        show_plan(api, target, folder)
        return
    commit, new = send(api, target, folder, f'Publish {folder.name} with timm-multiexit {__version__}')
    verify_files(api, target, folder)
    if network:
        verify_network(target, commit, network)
    done = 'published' if new else 'unchanged, no commit made'
    print(f'{target}: {done}; verified at commit {commit[:12]}')


def run(argv: Sequence[str]) -> None:
    """Publishes what the arguments name."""
    args = parse_args(argv)
    require_timm('1.0.31', 'publishing')
    if not args.dry_run and not get_token():
        raise InputError('no token for the Hub: log in with `hf auth login` or set HF_TOKEN')
    names = args.models or ([] if args.space else list_networks(pretrained=True))
    if not names and not args.space:
        raise InputError('this package holds no weights: name a folder')
    # Read all before uploading the first, so that an error in the last publishes nothing.
    networks = [read_network(name, args.name) for name in names]
    called = [network.name for network in networks]
    if twice := [name for i, name in enumerate(called) if name in called[:i]]:
        raise InputError(f"two networks are called '{twice[0]}': push them one at a time, with --name")
    api = HfApi(library_name='timm-multiexit', library_version=__version__)
    for network in networks:
        with TemporaryDirectory() as scratch:
            folder = build_folder(network, Path(scratch) / network.name, args.org, args.with_images)
            push(args, api, folder, check_folder(network, folder), network)
    if args.space:
        with TemporaryDirectory() as scratch:
            folder = build_space(Path(scratch) / SPACE, args.org)
            push(args, api, folder, check_space(folder))


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs the command; returns the status of `run_command`. Interrupted, nothing is half published: a commit is one
    request.
    """
    return run_command('push.py', run, argv)


if __name__ == '__main__':
    sys.exit(main())
