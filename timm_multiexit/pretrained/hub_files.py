"""Files of Hub repositories: downloaded to the cache and checked against their hash; errors in one line each."""
import hashlib
import logging
import re
import time
from pathlib import Path
from typing import Dict, List, Optional, Tuple

from huggingface_hub import constants as hub_constants
from huggingface_hub import hf_hub_url, try_to_load_from_cache
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
from huggingface_hub.utils import build_hf_headers, get_session
from timm.models._hub import download_from_hf, hf_split  # private: they alone know timm's 'ORG/NAME@REVISION'

from ..errors import InputError, MissingFileError, first_line
from ..files import sha256

EXAMPLES_FILE, SPRITE_FILE = 'examples.json', 'images.png'  # images that the app shows
WEIGHTS_FILE = 'model.safetensors'
CONFIG_FILE = 'config.json'
HUB_ERRORS = (OSError, RuntimeError, ValueError, AssertionError, HTTPError, HFValidationError)
TIMEOUT = 10.  # seconds that the Hub has to answer; its client would try six times as long, for each file
REMEMBER = 60.  # seconds for which a Hub that timed out is not tried again
_logger = logging.getLogger(__name__)
_silent: Dict[str, Tuple[float, str]] = {}  # by endpoint: when it did not answer, and the reason
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


def _silence(place: str, filename: str) -> str:
    """Why the Hub does not answer at all, in a few words; empty if it does, whatever it says, or is not to be asked."""
    endpoint, now = hub_constants.ENDPOINT, time.monotonic()
    if hub_constants.HF_HUB_OFFLINE:
        return ''
    since, reason = _silent.get(endpoint, (-REMEMBER, ''))
    if now - since < REMEMBER:
        return reason
    try:
        repository, revision = hf_split(place)
        get_session().head(hf_hub_url(repository, filename, revision=revision), headers=build_hf_headers(),
                           timeout=TIMEOUT)
    except (HFValidationError, AssertionError):  # no name of a repository: the download says so
        return ''
    except (HTTPError, OSError) as error:
        if time.monotonic() - now > TIMEOUT / 2:  # a refusal is quick, so that asking again costs nothing
            _silent[endpoint] = now, first_line(error)
        return first_line(error)
    return ''


def hub_file(place: str, filename: str) -> Path:
    """Path of a repository's file in the local cache, downloaded if necessary.

    If the Hub does not answer within 10 s, the cached file serves, with a note. The client checks only a file's size. A
    damaged one would stay in the cache and be used from then on, so it is removed.

    Args:
        place: 'ORG/NAME' or 'ORG/NAME@REVISION'.
        filename: Path in the repository.

    Raises:
        MissingFileError: the repository lacks it.
        InputError: it cannot be downloaded, or the download was damaged.
    """
    if reason := _silence(place, filename):
        repository, revision = hf_split(place)
        cached = try_to_load_from_cache(repository, filename, revision=revision)
        if not isinstance(cached, str):
            raise InputError(f"'hf-hub:{place}' cannot be read, {filename}: the Hub cannot be reached ({reason}), and "
                             'the file is not in the cache: check the connection and HF_ENDPOINT, then run this again')
        _logger.warning(f'the Hub cannot be reached ({reason}): {filename} of {place} is from the cache')
        return Path(cached)
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
        return sha256(blob)
    if re.fullmatch('[0-9a-f]{40}', blob.name):  # git's hash, for small files
        content = blob.read_bytes()
        return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()
    return blob.name
