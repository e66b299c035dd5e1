"""Names of networks and of their weights: 'arch', 'arch.tag', 'hf-hub:ORG/NAME[@REVISION]' or 'local-dir:PATH'."""
import difflib
import pickle
from pathlib import Path
from typing import List, Optional, Sequence, Tuple

import timm
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from timm.models._hub import load_model_config_from_path  # private: timm exports only its twin for the Hub

from ..errors import InputError, first_line
from ..models import MultiExitNet
from .hub_files import CONFIG_FILE, hub_file

# What timm, torch and the Hub's client raise on a config or weights that are missing, damaged or do not fit.
LOAD_ERRORS = (
    OSError, RuntimeError, ValueError, TypeError, AttributeError, KeyError, EOFError, AssertionError,
    pickle.UnpicklingError, SafetensorError, HfHubHTTPError, HFValidationError)


def list_networks(pretrained: bool = False) -> List[str]:
    """Names of this package's networks in timm's registry.

    Args:
        pretrained: List the trained weights instead, as 'arch.tag'.
    """
    names = []
    for arch in timm.list_models():
        if timm.model_entrypoint(arch).__module__.startswith('timm_multiexit.models.'):
            names += timm.list_pretrained(f'{arch}.*') if pretrained else [arch]
    return names


def check_name(name: str) -> None:
    """Checks that a name is one of timm's networks, and its tag one of that network's.

    Raises:
        InputError: it is not, or the repository or folder that it names cannot be read.
    """
    source, colon, place = name.partition(':')
    if colon:
        arch = _stored_arch(name, source, place)
        if not timm.is_model(arch):
            raise InputError(f"'{name}' holds a '{arch}', which this version does not know: update timm-multiexit")
        return
    arch, _, tag = name.partition('.')
    if not timm.is_model(arch):
        networks = list_networks()
        near = difflib.get_close_matches(arch, networks, n=1, cutoff=0.5)
        hint = f'did you mean {near[0]}?' if near else f"choose one of {', '.join(networks)}"
        raise InputError(f"unknown network '{arch}': {hint}")
    tags = [t.partition('.')[2] for t in timm.list_models(f'{arch}.*', include_tags=True)]
    if tag and tag not in tags:
        raise InputError(f"unknown tag '{tag}' of {arch}: choose one of {', '.join(tags)}")


def _stored_arch(name: str, source: str, place: str) -> str:
    """The architecture that the config of a repository or folder names."""
    if source not in ('hf-hub', 'local-dir'):
        raise InputError(f"unknown source '{source}:' in '{name}': use hf-hub: or local-dir:")
    folder = hub_file(place, CONFIG_FILE).parent if source == 'hf-hub' else Path(place)
    try:
        return load_model_config_from_path(folder)[1]
    except LOAD_ERRORS as error:
        raise InputError(f"'{name}' cannot be read, {CONFIG_FILE}: {first_line(error)}") from error


def with_default_tag(name: str) -> str:
    """'arch.tag' of a registered name, with the tag that timm takes without one; 'arch' alone where it has none."""
    cfg = None if '.' in name else timm.get_pretrained_cfg(name)
    return f'{name}.{cfg.tag}' if cfg is not None and cfg.tag else name


def require_weights(name: str) -> None:
    """Checks that a registered name has exits and pretrained weights; names of repositories and folders pass.

    Raises:
        InputError: it has none.
    """
    if ':' in name:
        return
    check_name(name)
    arch, _, tag = name.partition('.')
    networks = list_networks()
    if arch not in networks:
        raise without_exits(name)
    trained, full = list_networks(pretrained=True), with_default_tag(name)
    if full not in trained:
        meant = '' if full == name else f' means {full}, which'
        own = [other for other in trained if other.startswith(f'{arch}.')]
        raise InputError(f"'{name}'{meant} has no trained weights: give a checkpoint of your own, or choose "
                         f"{' or '.join(own) or 'one of ' + ', '.join(trained)}")


def without_exits(name: str) -> InputError:
    """The error for a network that has none."""
    return InputError(f"'{name}' has no exits: train some with train_timm.py --model multiexit --model-kwargs "
                      f"backbone={name} at=3, or choose one of {', '.join(list_networks())}")


def may_be_classes(names: Optional[Sequence[str]], classes: Optional[Sequence[str]]) -> bool:
    """Whether a network's recorded class names can be those of a data set.

    They are equal, unknown, or of another vocabulary altogether, as ImageNet's words and the names of its folders.
    """
    return not names or not classes or list(names) == list(classes) or not set(names) & set(classes)


def class_labels(model: MultiExitNet, stored: Optional[Sequence[str]] = None) -> Tuple[str, ...]:
    """Names of a network's classes, in the order of its logits.

    Args:
        model: The network.
        stored: Names stored with its weights; they take precedence over those of its pretrained cfg.

    Returns:
        The first of the two that has as many names as the network has classes, else 'class 0', 'class 1', ...
    """
    for names in (stored, model.pretrained_cfg.get('label_names')):
        if names and len(names) == model.num_classes:
            return tuple(names)
    return tuple(f'class {i}' for i in range(model.num_classes))
