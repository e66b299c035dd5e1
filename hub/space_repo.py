"""The folder that becomes the Space: the app at its top, the package beside it, and what both need."""
import shutil
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import yaml
from huggingface_hub import SpaceCard
from model_repo import packaged_networks
from publication import CARD, validate_card

from timm_multiexit.errors import InputError

PROJECT = Path(__file__).resolve().parent.parent
SPACE = 'timm-multiexit-app'

# Caches, stubs that gradio writes while it runs, and the tools that only the maker of the app runs.
_LEFT_OUT = shutil.ignore_patterns('__pycache__', '.*', '*.pyi', 'tools')

# Spaces have no GPU by default; PyPI's Linux wheels of torch bring gigabytes of CUDA libraries.
_TORCH_INDEX = '--extra-index-url https://download.pytorch.org/whl/cpu'


def build_space(folder: Path, organisation: str, app: Path = PROJECT / 'app') -> Path:
    """Writes the Space: the app's files at the top and the package with its weights as a folder beside them.

    The package is sent along, so that the Space shows the very state it was pushed from; what it needs is installed
    there from requirements.txt, and gradio by the SDK version that the front matter names.

    Args:
        folder: Where to write.
        organisation: Whose networks the Space is linked with.
        app: The app's folder.

    Raises:
        InputError: the app is not there, or its front matter cannot be read.
    """
    if not (app / CARD).is_file():
        raise InputError(f"'{app}' holds no {CARD} with a Space's front matter: run this from a clone of the project")
    shutil.copytree(app, folder, ignore=_LEFT_OUT, dirs_exist_ok=True)
    shutil.copytree(PROJECT / 'timm_multiexit', folder / 'timm_multiexit', ignore=_LEFT_OUT, dirs_exist_ok=True)
    shutil.copyfile(PROJECT / 'LICENSE', folder / 'LICENSE')
    needed = sorted(r for r in requires('timm-multiexit') or () if 'extra ==' not in r)
    (folder / 'requirements.txt').write_text('\n'.join([_TORCH_INDEX, *needed]) + '\n', encoding='utf-8')
    card = _load_card(folder)
    card.data.models = [f'{organisation}/{name}' for name in packaged_networks()]
    card.save(folder / CARD)
    return folder


def _load_card(folder: Path) -> SpaceCard:
    try:
        return SpaceCard.load(folder / CARD)
    except (ValueError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"the front matter of the app's {CARD} cannot be read: {reason}") from error


def check_space(folder: Path) -> str:
    """Checks the front matter, and that the package is found in the folder as it will be on the Space.

    Returns:
        A note if the Hub's validator could not be asked, else ''.

    Raises:
        InputError: the Space would not start.
    """
    card = _load_card(folder)
    values = card.data.to_dict()
    if values.get('sdk') != 'gradio' or not values.get('sdk_version'):
        raise InputError(f"the front matter of the app's {CARD} must hold sdk: gradio and sdk_version")
    app_file = values.get('app_file') or ''
    if not (folder / app_file).is_file():
        raise InputError(f"the front matter of the app's {CARD} names app_file '{app_file}', which is not there")
    found = subprocess.run(
        [sys.executable, '-c', 'import timm_multiexit; print(timm_multiexit.__file__)'], cwd=folder,
        capture_output=True, text=True)
    lines = found.stdout.split()
    if found.returncode or not lines or folder.resolve() not in Path(lines[-1]).resolve().parents:
        reason = (found.stderr.splitlines() or ['another copy is found'])[-1]
        raise InputError(f'the package does not import in the Space: {reason}')
    for cache in folder.rglob('__pycache__'):
        shutil.rmtree(cache)
    return validate_card(card, 'space')
