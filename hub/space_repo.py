"""The Space: the app at the top, the package beside it, and their requirements."""
import shutil
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path
from typing import List

import yaml
from huggingface_hub import SpaceCard
from publication import CARD, validate_card

from timm_multiexit import InputError, list_networks

PROJECT = Path(__file__).resolve().parent.parent
SPACE = 'timm-multiexit-app'

# Spaces have no GPU by default; the default Linux wheels of torch bring gigabytes of CUDA libraries.
_TORCH_INDEX = '--extra-index-url https://download.pytorch.org/whl/cpu'


def build_space(folder: Path, organisation: str, app: Path = PROJECT / 'app') -> Path:
    """Writes the Space: the app's files at the top and the package with its weights in a folder beside them.

    The package is included so that the Space runs exactly the version it was pushed from. Its dependencies are listed
    in requirements.txt; gradio comes with the SDK version in the front matter.

    Args:
        folder: Where to write.
        organisation: Owner of the networks that the Space links to.
        app: The app's folder.

    Raises:
        InputError: no app, or its front matter cannot be read.
    """
    if not (app / CARD).is_file():
        raise InputError(f"'{app}' has no {CARD} with a Space's front matter: run this from a clone of the project")
    for name in _tracked('app', 'timm_multiexit', 'LICENSE'):
        top, _, inner = name.partition('/')
        source, target = (app / inner, folder / inner) if top == 'app' else (PROJECT / name, folder / name)
        if source.is_symlink():
            raise InputError(f"'{source}' is a link, and what it points to is not published: replace it by the file")
        if source.is_file() and not inner.startswith('tools/'):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    needed = sorted(r for r in requires('timm-multiexit') or () if 'extra ==' not in r)
    (folder / 'requirements.txt').write_text('\n'.join([_TORCH_INDEX, *needed]) + '\n', encoding='utf-8')
    card = _load_card(folder)
    card.data.models = [f'{organisation}/{name}' for name in list_networks(pretrained=True)]
    card.save(folder / CARD)
    return folder


def _tracked(*places: str) -> List[str]:
    """Files of the project that git tracks: others beside them are private.

    Raises:
        InputError: this is not a clone.
    """
    listed = subprocess.run(['git', 'ls-files', '-z', '--', *places], cwd=PROJECT, capture_output=True, text=True)
    if listed.returncode or not listed.stdout:
        raise InputError(f"'{PROJECT}' is not a clone of the project, whose files git lists: run this from one")
    return listed.stdout.rstrip('\0').split('\0')


def _load_card(folder: Path) -> SpaceCard:
    try:
        return SpaceCard.load(folder / CARD)
    except (ValueError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"the front matter of the app's {CARD} cannot be read: {reason}") from error


def check_space(folder: Path) -> str:
    """Checks the front matter, and that the package is imported from the folder, as on the Space.

    Returns:
        A note if the Hub's validator could not be reached, else ''.

    Raises:
        InputError: the Space would not start.
    """
    card = _load_card(folder)
    values = card.data.to_dict()
    if values.get('sdk') != 'gradio' or not values.get('sdk_version'):
        raise InputError(f"the front matter of the app's {CARD} must hold sdk: gradio and sdk_version")
    app_file = values.get('app_file') or ''
    if not (folder / app_file).is_file():
        raise InputError(f"the front matter of the app's {CARD} names app_file '{app_file}', which does not exist")
    found = subprocess.run(
        [sys.executable, '-c', 'import timm_multiexit; print(timm_multiexit.__file__)'], cwd=folder,
        capture_output=True, text=True)
    lines = found.stdout.split()
    if found.returncode or not lines or folder.resolve() not in Path(lines[-1]).resolve().parents:
        reason = (found.stderr.splitlines() or ['another copy is imported'])[-1]
        raise InputError(f'the package does not import in the Space: {reason}')
    for cache in folder.rglob('__pycache__'):
        shutil.rmtree(cache)
    return validate_card(card, 'space')
