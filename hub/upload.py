"""Uploads a folder to the Hub: compare, one commit, verify."""
import getpass
import re
import socket
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Dict, List, Optional, Tuple

import timm
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash
from model_repo import Network, differences

from timm_multiexit import ExitConfig, InputError
from timm_multiexit.files import sha256
from timm_multiexit.pretrained.hub_files import HUB_ERRORS, explain
from timm_multiexit.stopping.config import FILE_NAME, SCORES_NAME

_KEPT = ('.gitattributes',)  # the Hub's own
_OURS = 'timm_multiexit/'  # in a Space, whole
# What tells about a person or a machine, and must not be published.
_PRIVATE = {
    'a path': re.compile(r"""(?<![\w.])(/(home|Users|root|mnt|tmp)/[\w.-]+|~/\w[\w.-]*|[A-Za-z]:\\\\?[\w.-]+\\)"""),
    'a token': re.compile(r'\b(hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9-]{20,}|AKIA[A-Z0-9]{16})'),
}
_COMMON = ('root', 'user', 'admin', 'ubuntu', 'runner', 'localhost', 'main')  # words that texts use


@dataclass(frozen=True)
class Target:
    """A repository 'ORG/NAME', its type ('model' or 'space'), a branch, and whether to create it as private."""

    repo_id: str
    repo_type: str = 'model'
    revision: Optional[str] = None
    private: bool = False

    def __str__(self) -> str:
        return self.repo_id + (f'@{self.revision}' if self.revision else '')


@dataclass(frozen=True)
class Change:
    """One file: the action, bytes, and SHA-256 ('' where there is no local file).

    Actions are 'add', 'replace', 'keep', 'leave' (a file that someone else put there) and 'delete' (one of an earlier
    version of the package in a Space).
    """

    action: str
    path: str
    size: int
    digest: str


@contextmanager
def doing(what: str):
    """Turns errors of the client into one line that begins with what was being done."""
    try:
        yield
    except HUB_ERRORS as error:
        raise InputError(f'{what} failed: {explain(error)}') from error


def compare(folder: Path, remote: Dict[str, RepoFile]) -> List[Change]:
    """The changes that bring a folder's files into a repository, from the files' hashes.

    Args:
        folder: The local files.
        remote: The repository's files by path, from `remote_files`.
    """
    local = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob('*')) if p.is_file()}
    gone = sorted(remote.keys() - local.keys() - set(_KEPT))
    changes = []
    for name, path in local.items():
        there, digest = remote.get(name), sha256(path)
        action = 'add'
        if there is not None:
            same = there.lfs.sha256 == digest if there.lfs is not None else (
                there.blob_id == git_hash(path.read_bytes()))
            action = 'keep' if same else 'replace'
        changes.append(Change(action, name, path.stat().st_size, digest))
    return changes + [Change('delete' if name.startswith(_OURS) else 'leave', name, remote[name].size, '')
                      for name in gone]


def check_private(folder: Path, owner: str = '') -> None:
    """Reads every text that would be sent.

    Args:
        folder: Holds the files.
        owner: User or organisation of the repository, whose name is public.

    Raises:
        InputError: one names a path, the user or the host of this machine, or holds a token.
    """
    patterns = dict(_PRIVATE)
    names = [('the host name', socket.gethostname())]
    with suppress(KeyError, OSError):  # in a container a user may have no name
        names.append(('the user name', getpass.getuser()))
    for what, name in names:
        if len(name) > 3 and name not in (*_COMMON, owner):
            patterns[what] = re.compile(rf'\b{re.escape(name)}\b')
    for path in sorted(path for path in folder.rglob('*') if path.is_file()):
        data = path.read_bytes()
        if b'\0' in data:  # weights, pictures
            continue
        for number, line in enumerate(data.decode(errors='replace').splitlines(), 1):
            for what, pattern in patterns.items():
                if found := pattern.search(line):
                    shown = found.group()[:6] + '...' if what == 'a token' else found.group()
                    raise InputError(
                        f"'{path.relative_to(folder)}', line {number}, holds {what} ('{shown}'), and nothing was "
                        'published: remove it from the file beside the weights')


def remote_files(api: HfApi, target: Target) -> Tuple[Optional[str], Dict[str, RepoFile]]:
    """The head commit of a branch and its files by path; None and {} if the branch does not exist yet."""
    kind = target.repo_type
    try:
        commit = api.repo_info(target.repo_id, repo_type=kind, revision=target.revision).sha
        tree = api.list_repo_tree(target.repo_id, recursive=True, repo_type=kind, revision=commit)
        return commit, {f.path: f for f in tree if isinstance(f, RepoFile)}
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        if error.response.status_code == 404:
            return None, {}
        raise


def send(api: HfApi, target: Target, folder: Path, message: str) -> Tuple[str, bool]:
    """Brings a folder's files into a repository in one commit: everything is published or nothing.

    A missing repository or branch is created. If nothing differs, no commit is made.

    Returns:
        The head commit of the branch, and whether it is new.

    Raises:
        InputError: what failed, why, and what to do. The branch is then unchanged.
    """
    with doing(f'creating the repository {target.repo_id}'):
        api.create_repo(
            target.repo_id, repo_type=target.repo_type, private=target.private or None, exist_ok=True,
            space_sdk='gradio' if target.repo_type == 'space' else None)
        if target.revision:
            api.create_branch(target.repo_id, branch=target.revision, repo_type=target.repo_type, exist_ok=True)
    with doing(f'reading the repository {target}'):
        parent, remote = remote_files(api, target)
    if parent is None:
        raise InputError(f'the Hub does not show the repository {target} that it just created: run this again')
    operations = []
    for change in compare(folder, remote):
        if change.action in ('add', 'replace'):
            operations.append(CommitOperationAdd(change.path, str(folder / change.path)))
        elif change.action == 'delete':
            operations.append(CommitOperationDelete(change.path))
    if not operations:
        return parent, False
    with doing(f'uploading to {target} (nothing was published)'):
        # parent_commit makes the Hub refuse the commit if the branch has moved. One thread, so that the error reported
        # is the first: with several, one closes the connection of the others, which then report that.
        info = api.create_commit(
            target.repo_id, operations, commit_message=message, repo_type=target.repo_type, revision=target.revision,
            parent_commit=parent, num_threads=1)
    return info.oid, True


def verify_files(api: HfApi, target: Target, folder: Path) -> None:
    """Checks by hash that the repository holds the folder's files.

    Raises:
        InputError: it does not, or the Hub cannot be reached.
    """
    with doing(f'published, but checking {target} afterwards'):
        _, remote = remote_files(api, target)
    wrong = [c.path for c in compare(folder, remote) if c.action not in ('keep', 'leave')]
    if wrong:
        raise InputError(f"published, but {', '.join(wrong)} of {target} differs from the upload: run this again")


def verify_network(target: Target, commit: str, network: Network) -> None:
    """Loads a published network as a user would, with an empty cache, and compares all logits and the exit config.

    Raises:
        InputError: it cannot be loaded, or differs.
    """
    with doing(f'published, but loading hf-hub:{target} back'), TemporaryDirectory() as cache:
        loaded = timm.create_model(f'hf-hub:{target.repo_id}@{commit}', pretrained=True, cache_dir=cache)
        hf_hub_download(target.repo_id, SCORES_NAME, revision=commit, cache_dir=cache)  # read beside the config
        stored = hf_hub_download(target.repo_id, FILE_NAME, revision=commit, cache_dir=cache)
        exits = ExitConfig.load(stored)
    differing = differences(network.model, loaded)
    if differing or exits != network.exits:
        what = f'the logits of {differing} exits differ' if differing else 'the exit config differs'
        raise InputError(f'published, but hf-hub:{target} is not {network.name}: {what}')
