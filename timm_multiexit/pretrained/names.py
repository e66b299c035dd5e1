"""Names of networks and of their weights."""
import difflib
import pickle
from typing import List

import timm
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from timm.models._hub import load_model_config_from_path  # private: timm exports only the Hub's twin of it

from ..errors import InputError
from .hub_files import CONFIG_FILE, hub_file

LOAD_ERRORS = (
    OSError, RuntimeError, ValueError, KeyError, EOFError, AssertionError, pickle.UnpicklingError, SafetensorError,
    HfHubHTTPError, HFValidationError)


def list_networks(pretrained: bool = False) -> List[str]:
    """Names of this package's networks in timm's registry; with `pretrained` those with weights, as 'arch.tag'."""
    names = []
    for arch in timm.list_models():
        if timm.model_entrypoint(arch).__module__.startswith('timm_multiexit.models.'):
            names += timm.list_pretrained(f'{arch}.*') if pretrained else [arch]
    return names


def check_name(name: str) -> None:
    if ':' in name:
        source, _, place = name.partition(':')
        try:
            if source == 'hf-hub':
                arch = load_model_config_from_path(hub_file(place, CONFIG_FILE).parent)[1]
            elif source == 'local-dir':
                arch = load_model_config_from_path(place)[1]
            else:
                raise InputError(f"unknown source '{source}:' in '{name}': use hf-hub: or local-dir:")
        except LOAD_ERRORS as error:
            raise InputError(f"'{name}' cannot be read, {CONFIG_FILE}: {first_line(error)}") from error
        if not timm.is_model(arch):
            raise InputError(f"'{name}' holds a '{arch}', which this version does not know")
        return
    arch, _, tag = name.partition('.')
    networks = list_networks()
    if not timm.is_model(arch):
        near = difflib.get_close_matches(arch, networks, n=1, cutoff=0.5)
        hint = f'did you mean {near[0]}?' if near else f"choose one of {', '.join(networks)}"
        raise InputError(f"unknown network '{arch}': {hint}")
    tags = [t.partition('.')[2] for t in timm.list_models(f'{arch}.*', include_tags=True)]
    if tag and tag not in tags:
        raise InputError(f"unknown tag '{tag}' of {arch}: choose one of {', '.join(tags)}")


def require_weights(name: str) -> None:
    """Checks that a registered name has pretrained weights.

    Raises:
        InputError: it has none.
    """
    if ':' in name:
        return
    check_name(name)
    if name.partition('.')[0] not in list_networks():
        raise InputError(f"'{name}' has no exits: choose one of {', '.join(list_networks())}")
    trained = list_networks(pretrained=True)
    arch = name.partition('.')[0]
    if not (name in trained or ('.' not in name and any(t.partition('.')[0] == arch for t in trained))):
        raise InputError(
            f"there are no trained weights for '{name}' yet: pass --checkpoint FILE, or choose one of "
            f"{', '.join(trained) or 'none so far'}")


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
