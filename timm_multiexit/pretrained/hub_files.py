"""Files of Hub repositories: downloaded to the cache and checked against their hash; errors in one line each."""
import hashlib
import re
from pathlib import Path
from typing import List, Optional

from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from timm.models._hub import download_from_hf  # private: it alone knows timm's 'ORG/NAME@REVISION'

from ..errors import InputError, MissingFileError

WEIGHTS_FILE = 'model.safetensors'
CONFIG_FILE = 'config.json'
HUB_ERRORS = (OSError, RuntimeError, ValueError, AssertionError, HTTPError, HFValidationError)
_LOGIN = 'log in with `hf auth login` or set HF_TOKEN'
_REASONS = {
    401: f'the Hub does not accept the token (401): {_LOGIN}',
    403: f'the token does not allow this (403): use one with the rights for it, {_LOGIN}',
    404: f'there is no such repository, or it is private (404): check its name, or {_LOGIN}',
    409: 'someone else changed the repository in the meantime (409): run this again',
    412: 'someone else changed the repository in the meantime (412): run this again',
}


def explain(error: BaseException) -> str:
    """One line on what went wrong with the Hub and what to do, from an error of its client."""
    seen: List[BaseException] = []
    cause: Optional[BaseException] = error
    while cause is not None and cause not in seen:
        seen.append(cause)
        cause = cause.__cause__
    for e in seen:
        if isinstance(e, OfflineModeIsEnabled):
            return 'it is not in the cache and HF_HUB_OFFLINE forbids downloading it: unset that'
        if isinstance(e, RevisionNotFoundError):
            return 'there is no such revision (404): check its name'
        if _lacks_file(e):
            return 'the repository does not hold this file (404)'
        if isinstance(e, HfHubHTTPError) and e.response is not None:
            status = e.response.status_code
            if status == 401 and isinstance(e, RepositoryNotFoundError):  # the Hub's answer where access is denied
                return f'there is no such repository, or the token may not see it (401): check its name, or {_LOGIN}'
            if status == 429:
                wait = e.response.headers.get('Retry-After')
                return f'too many requests (429): run this again {f"in {wait} s" if wait else "later"}'
            if status >= 500:
                return f'the Hub has an internal error ({status}): run this again later'
            return _REASONS.get(status) or first_line(e)
    if any(isinstance(e, (HTTPError, ConnectionError)) for e in seen):
        return (f'the Hub cannot be reached ({first_line(seen[-1])}): check the connection and HF_ENDPOINT, then run '
                'this again')
    if 'Consistency check failed' in str(seen[0]):
        return 'the download was cut off: run this again'
    return first_line(seen[0]) + (f' ({first_line(seen[-1])})' if len(seen) > 1 else '')


def _lacks_file(error: BaseException) -> bool:
    """Whether the repository was reached but lacks the file; huggingface_hub 1.0 added a class for it."""
    return isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, its class if there is none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def hub_file(place: str, filename: str) -> Path:
    """Path of a repository's file in the local cache, downloaded if necessary.

    The client checks only its size. A damaged file would stay in the cache and be used from then on, so it is removed.

    Args:
        place: 'ORG/NAME' or 'ORG/NAME@REVISION'.
        filename: Path in the repository.

    Raises:
        MissingFileError: the repository lacks it.
        InputError: it cannot be downloaded, or the download was damaged.
    """
    try:
        path = Path(download_from_hf(place, filename))
    except HUB_ERRORS as error:
        if not _lacks_file(error):
            raise InputError(f"'hf-hub:{place}' cannot be read, {filename}: {explain(error)}") from error
        if filename == WEIGHTS_FILE:
            raise MissingFileError(
                f"'hf-hub:{place}' holds no {WEIGHTS_FILE}: pickled weights are not loaded, since they can run code; "
                'ask its owner for safetensors') from error
        raise MissingFileError(
            f"'hf-hub:{place}' holds no {filename}: it is not a repository of a timm network") from error
    blob = path.resolve()
    if _hash_like(blob) != blob.name:
        path.unlink(missing_ok=True)
        blob.unlink(missing_ok=True)
        raise InputError(
            f"{filename} of 'hf-hub:{place}' was damaged in the download and removed from the cache: run this again")
    return path


def _hash_like(blob: Path) -> str:
    """The hash of a cached file, of the kind that its name is; the name itself if it is not a hash."""
    if re.fullmatch('[0-9a-f]{64}', blob.name):
        with blob.open('rb') as file:
            return hashlib.sha256(file.read()).hexdigest()
    if re.fullmatch('[0-9a-f]{40}', blob.name):  # git's hash, for small files
        content = blob.read_bytes()
        return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()
    return blob.name
