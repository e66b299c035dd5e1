"""Loads networks with their weights by name. A bad name and unreadable or unsuitable weights are InputErrors."""
import argparse
import logging
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Tuple, Union

import timm
import torch
from timm.models import load_state_dict
from timm.models._hub import load_model_config_from_path  # private: timm exports only its twin for the Hub

from ..datasets import DATASETS, find_dataset
from ..errors import InputError, first_line
from ..models import MultiExitNet
from .exit_config import load_recipe
from .hub_files import CONFIG_FILE, WEIGHTS_FILE, hub_file
from .names import LOAD_ERRORS, check_name, list_networks, may_be_classes, require_weights, without_exits
from .record import TrainingData, describe, find_weights, read_config, read_training_data

_logger = logging.getLogger(__name__)


def load_model(
        name: str = '',
        checkpoint: Union[str, Path] = '',
        num_classes: Optional[int] = None,
        device: Union[str, torch.device] = 'cpu',
        **kwargs: Any,
) -> MultiExitNet:
    """A network in eval mode with trained weights.

    Args:
        name: A name from the registry with or without tag, or timm's 'hf-hub:ORG/NAME' or 'local-dir:PATH'; not
            needed with a checkpoint that has a record beside it.
        checkpoint: Folder or file with weights to use instead of the pretrained ones: safetensors, or a checkpoint of
            train_timm.py, whose EMA weights are preferred. A config.json beside it names the network and its classes.
        num_classes: Number of classes; None for that of the record or pretrained cfg.
        device: Device of the network.
        **kwargs: Further arguments of the network.

    Raises:
        InputError: unknown name or tag, a network without exits, or weights that are missing, damaged or do not fit.
    """
    name, checkpoint = find_weights(name, checkpoint)
    check_name(name)
    if ':' not in name and name.partition('.')[0] not in list_networks():  # its weights need not be fetched to tell
        raise without_exits(name)
    source = name if checkpoint else _safe_source(name)
    if num_classes is not None:
        kwargs['num_classes'] = num_classes
    try:
        model = timm.create_model(source, pretrained=not checkpoint, **kwargs)
    except LOAD_ERRORS as error:
        if ':' in name and _is_misfit(error):
            raise InputError(f"the weights of '{name}' do not fit the network that its {CONFIG_FILE} names") from error
        raise InputError(f"network '{name}' cannot be loaded: {first_line(error)}") from error
    if not isinstance(model, MultiExitNet):
        raise without_exits(name)
    if not checkpoint and model.num_classes != (stored := model.pretrained_cfg['num_classes']):
        raise InputError(f"the weights of '{name}' are for {stored} classes, not {model.num_classes}: leave out "
                         '--num-classes; other classes need training (train_timm.py --pretrained)')
    if checkpoint:
        _load_checkpoint(model, Path(checkpoint), name)
    if wrong := [k for k, v in model.state_dict().items() if not v.isfinite().all()]:
        raise InputError(f"the weights of '{checkpoint or name}' are not finite ('{wrong[0]}'): the training diverged, "
                         'or the file is damaged')
    _read_record(model, name, checkpoint)
    return model.to(device).eval()


def _read_record(model: MultiExitNet, name: str, checkpoint: str) -> None:
    """Attaches what the record beside the weights says; class names that are not theirs are dropped."""
    source, colon, place = name.partition(':')
    if colon:
        folder = Path(place) if source == 'local-dir' else hub_file(place, CONFIG_FILE).parent
        vars(model)['training_data'] = read_training_data(folder / CONFIG_FILE)
    elif checkpoint:  # written before there was a record
        known = DATASETS.get(name.partition('.')[2])  # a tag that the user gave
        dataset = load_recipe(name, checkpoint).get('dataset', known.name if known else '')
        describe(model, TrainingData(dataset), known.classes if (known := find_dataset(dataset)) else None)


def load_teacher(
        name: str,
        checkpoint: str,
        num_classes: int,
        kwargs: Dict[str, Any],
        input_size: Tuple[int, int, int],
        labels: Optional[Sequence[str]] = None,
) -> torch.nn.Module:
    """A trained network of this package, or any other of timm's, as a distillation teacher.

    Args:
        name: A name from timm's registry.
        checkpoint: File with its weights; '' for the pretrained ones, which keep their own classifier.
        num_classes: Number of classes.
        kwargs: Further arguments of the network.
        input_size: (C, H, W) of the images that it is to see.
        labels: Names of the classes, if they have any.

    Raises:
        InputError: it cannot be loaded, knows other classes, or does not take these images.
    """
    classes = num_classes if checkpoint else None  # a new classifier of pretrained weights would be random
    own = name.partition('.')[0] in list_networks()
    if own and not checkpoint:
        require_weights(name)
    try:
        teacher = load_model(name, checkpoint, classes, **kwargs) if own else timm.create_model(
            name, pretrained=not checkpoint, checkpoint_path=checkpoint, num_classes=classes, **kwargs)
    except LOAD_ERRORS as error:
        raise InputError(
            f"the teacher '{name}' cannot be loaded ({first_line(error)}): choose one of timm's networks") from error
    try:
        with torch.inference_mode():
            teacher.eval()(torch.zeros(1, *input_size))
    except (RuntimeError, AssertionError, ValueError) as error:  # a ViT takes one size only
        raise InputError(f"the teacher '{name}' does not take images of {' x '.join(map(str, input_size))} "
                         f'({first_line(error)}): choose another, or --input-size') from error
    cfg: Dict[str, Any] = vars(teacher)['pretrained_cfg']
    names = cfg.get('label_names') or ()
    if labels and len(names) == num_classes and not may_be_classes(names, labels):
        raise InputError(f"the teacher '{name}' knows other classes, or these in another order: choose one for "
                         f"{', '.join(labels[:5])}{' ...' if len(labels) > 5 else ''}")
    if checkpoint and not own:
        cfg.update((key, value) for key, value in seen_by(checkpoint).items() if key in ('mean', 'std'))
    if input_size[0] == 1:
        cfg.update((key, (sum(cfg[key]) / len(cfg[key]),)) for key in ('mean', 'std') if cfg.get(key))
    return teacher


def _safe_source(name: str) -> str:
    """What timm is to load, of which the weights are safetensors: it would fall back to a pickle.

    A repository's files are fetched here, so that timm reads them from the cache and asks the Hub no more.

    Raises:
        InputError: they are not, or the download was damaged.
    """
    source, colon, place = name.partition(':')
    if not colon or (source == 'local-dir' and (Path(place) / WEIGHTS_FILE).is_file()):
        return name
    if source == 'hf-hub':
        cfg = load_model_config_from_path(hub_file(place, CONFIG_FILE).parent)[0]
        filename = cfg.get('hf_hub_filename') or WEIGHTS_FILE
        if filename.endswith('.safetensors'):
            weights = hub_file(place, filename)
            return f'local-dir:{weights.parent}' if filename == WEIGHTS_FILE else name
    raise InputError(
        f"'{name}' holds no {WEIGHTS_FILE}: pickled weights are not loaded, since they can run code; ask its owner for "
        'safetensors')


def load_mean(
        model: MultiExitNet,
        paths: Sequence[Union[str, Path]],
        name: str,
        new_classes: bool = False,
) -> Dict[str, Any]:
    """Loads the mean of the weights of several runs ("model soup", Wortsman et al., ICML 2022).

    It works where the runs share the beginning of their training.

    Args:
        model: Changed in place. Its BN statistics are averaged too, which does not give those of the mean weights.
            Mean, deviation, interpolation and crop of its images become those of the first run.
        paths: Checkpoints as for `load_model`.
        name: Name of the network, for error messages.
        new_classes: Whether classifiers of another number of classes stay as they are, with a warning.

    Returns:
        How the weights of the first run saw their images, see `seen_by`.

    Raises:
        InputError: weights that cannot be read or do not fit.
    """
    mean: Dict[str, torch.Tensor] = {}
    for path in paths:
        _load_checkpoint(model, Path(path), name, new_classes)
        for key, value in model.state_dict().items():
            part = value.double() / len(paths) if value.is_floating_point() else value.clone()
            mean[key] = mean[key] + part if key in mean and value.is_floating_point() else part
    model.load_state_dict(mean)
    seen = seen_by(paths[0])
    model.pretrained_cfg.update(seen)
    return seen


def stored_checkpoint(path: Union[str, Path], mmap: bool = False) -> Dict[str, Any]:
    """What timm's `CheckpointSaver` wrote, with the options in it; nothing else in a pickle is loaded."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)


def seen_by(checkpoint: Union[str, Path]) -> Dict[str, Any]:
    """How weights saw their images: mean, std, interpolation, crop_pct and crop_mode, as far as they are known.

    They come from the record beside the weights; without one, from the options that timm's train.py keeps in its
    checkpoints, and then with the `input_size` (C, H, W) if one was given.
    """
    path = Path(checkpoint)
    config = (path if path.is_dir() else path.parent) / CONFIG_FILE
    cfg: Dict[str, Any] = {}
    if config.is_file():
        cfg = read_config(config).get('pretrained_cfg') or {}
        cfg.pop('input_size', None)
    elif path.is_file() and path.suffix != '.safetensors':
        options = stored_checkpoint(path).get('args')
        cfg = vars(options) if isinstance(options, argparse.Namespace) else {}
        if not cfg.get('input_size') and cfg.get('img_size'):
            cfg['input_size'] = (3, cfg['img_size'], cfg['img_size'])
    names = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')
    return {name: cfg[name] for name in names if cfg.get(name)}


def _load_checkpoint(model: MultiExitNet, path: Path, name: str, new_classes: bool = False) -> None:
    if path.is_dir():
        path = path / WEIGHTS_FILE
    if not path.is_file():
        raise InputError(f"checkpoint '{path}' is not a file")
    try:
        state = load_state_dict(str(path), use_ema=True, weights_only=True)
        if filter_fn := getattr(model, 'checkpoint_filter_fn', None):
            state = filter_fn(state, model)
        own = model.state_dict()
        if new_classes:
            _keep_classifiers(model, state, own, path)
        both = state.keys() & own.keys()
        if wrong := [k for k in both if state[k].is_floating_point() != own[k].is_floating_point()]:
            raise InputError(
                f"checkpoint '{path}' holds {state[wrong[0]].dtype} in '{wrong[0]}', where the network has "
                f'{own[wrong[0]].dtype}: quantized weights need their scales, give the original ones')
        model.load_state_dict(state, strict=True)
    except LOAD_ERRORS as error:
        if _is_misfit(error):
            raise InputError(
                f"checkpoint '{path}' does not fit {name} with {model.num_classes} classes: name the network and the "
                'number of classes that it was trained with') from error
        raise InputError(f"checkpoint '{path}' cannot be read, it may be cut off: {first_line(error)}") from error


def _keep_classifiers(model: MultiExitNet, state: Dict[str, Any], own: Dict[str, Any], path: Path) -> None:
    """Replaces classifiers of another number of classes in a checkpoint's state dict by the network's own."""
    layers = tuple(f'{layer}.' for layer in model.pretrained_cfg['classifier'])
    other = [k for k in state.keys() & own.keys() if k.startswith(layers) and state[k].shape[:1] != own[k].shape[:1]]
    if other:
        classes = len(state[other[0]])
        _logger.warning(f"'{path}' knows {classes} classes, not {model.num_classes}: all of it is used but the "
                        'classifiers of its exits')
        state.update((k, own[k]) for k in other)


def _is_misfit(error: BaseException) -> bool:
    """Whether weights were read but are those of another network: the messages are torch's."""
    return any(text in str(error) for text in ('size mismatch', 'Missing key', 'Unexpected key'))
