"""The exit config and the recipe stored with weights, by name."""
import hashlib
from pathlib import Path
from typing import Any, Dict, List, Union

from ..errors import MissingFileError
from ..files import read_yaml
from ..models import MultiExitNet
from ..models._pretrained import WEIGHTS_DIR
from ..stopping.config import FILE_NAME, RECIPE_NAME, SCORES_NAME, ExitConfig
from ..stopping.policy import CALIBRATE_HINT
from .hub_files import hub_file
from .names import check_name, with_default_tag


def load_exit_config(name: str, checkpoint: Union[str, Path] = '') -> ExitConfig:
    """The exit config stored with weights: what their exits cost, and when to stop for an average budget.

    Args:
        name: 'arch' or 'arch.tag' (in the package), 'hf-hub:ORG/NAME[@REVISION]', 'local-dir:PATH', or a file that
            `timm-multiexit calibrate --output` wrote.
        checkpoint: File with weights that replace the named ones; the config is read from the same folder.

    Raises:
        MissingFileError: no config is stored with these weights.
        InputError: unknown name, or a config that cannot be fetched or read.
    """
    if name.endswith('.json'):
        return ExitConfig.load(name)
    if not checkpoint:
        check_name(name)
    try:
        path = stored_path(name, FILE_NAME, checkpoint)
        stored_path(name, SCORES_NAME, checkpoint)  # fetched, to lie beside it
    except MissingFileError:
        raise MissingFileError(f"'{name}' holds no {FILE_NAME} and {SCORES_NAME}: {CALIBRATE_HINT}") from None
    if not path.is_file() and (checkpoint or ':' in name):
        raise MissingFileError(f"there is no {FILE_NAME} beside '{checkpoint or name}': {CALIBRATE_HINT}")
    if not path.is_file():
        others = ', '.join(list_stored())
        raise MissingFileError(
            f"no exit config is stored for '{path.parent.name}': {CALIBRATE_HINT}"
            + (f', or choose one of {others}' if others else ''))
    return ExitConfig.load(path)


def exit_config_of(model: MultiExitNet, name: str, checkpoint: Union[str, Path] = '') -> ExitConfig:
    """`load_exit_config`, checked to be of this very network.

    Raises:
        InputError: as there, or it is of another network or other weights.
    """
    config = load_exit_config(name, checkpoint)
    config.check_network(model, weights_digest(model))
    return config


def weights_digest(model: MultiExitNet) -> str:
    """SHA-256, in hex, over the sorted names, shapes and values of a network's tensors, whatever file they come from.

    Floating-point values count as float32, so that weights stored in half precision give the same digest anywhere.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value
        digest.update(f'{name} {tuple(value.shape)} {value.dtype}'.encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_recipe(name: str, checkpoint: Union[str, Path] = '') -> Dict[str, Any]:
    """Options of train_timm.py that produced these weights, from `recipe.yaml` beside them; empty if there is none.

    Args:
        name: As for `load_exit_config`.
        checkpoint: As for `load_exit_config`.

    Raises:
        InputError: unknown name, or a recipe that cannot be fetched or read.
    """
    if not checkpoint and ':' not in name:
        check_name(name)
    try:
        path = stored_path(name, RECIPE_NAME, checkpoint)
    except MissingFileError:  # a repository filled by another tool
        return {}
    recipe = read_yaml(path, 'recipe') if path.is_file() else {}
    return recipe if isinstance(recipe, dict) else {}


def stored_path(name: str, filename: str, checkpoint: Union[str, Path] = '') -> Path:
    """Path of `filename` beside these weights, whether it is there or not; from a repository it is downloaded."""
    if checkpoint:
        path = Path(checkpoint)
        return (path if path.is_dir() else path.parent) / filename
    source, colon, place = name.partition(':')
    if colon:
        return Path(place) / filename if source == 'local-dir' else hub_file(place, filename)
    return WEIGHTS_DIR / with_default_tag(name) / filename


def list_stored() -> List[str]:
    """Names 'arch.tag' of the weights whose exit config comes with the package."""
    return sorted(p.parent.name for p in WEIGHTS_DIR.glob(f'*/{FILE_NAME}'))
