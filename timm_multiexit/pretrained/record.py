"""The record of what a network was trained on: `config.json` beside its weights, so that nobody has to repeat it.

timm's own fields hold the architecture and its arguments, the class names, and size, channels, mean, deviation,
interpolation and crop of the images. The key `multiexit` holds what timm has no field for. A folder with this file and
`model.safetensors` is what timm calls a `local-dir:`, on disk and on the Hub alike.
"""
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Dict, Optional, Sequence, Tuple, Union

from timm.models._hub import save_config_for_hf  # private: the public save_for_hf writes the weights too

from ..datasets import DATASETS
from ..errors import InputError
from ..files import read_json
from ..models import MultiExitNet
from .exit_config import load_recipe
from .hub_files import CONFIG_FILE, WEIGHTS_FILE

RECORD_KEY = 'multiexit'


@dataclass(frozen=True)
class TrainingData:
    """What timm's config has no field for.

    Attributes:
        dataset: timm's name of the data set, '' if unknown.
        value_range: Raw values of images with more than 8 bits a channel that are black and white; None if there were
            none among the training images.
        held_out: Which images were held out and how, see `data.splits`.
    """

    dataset: str = ''
    value_range: Optional[Tuple[float, float]] = None
    held_out: Dict[str, Any] = field(default_factory=dict)


def training_data(model: MultiExitNet) -> TrainingData:
    """What `load_model` read for these weights; for those of the package, what their tag says."""
    stored = vars(model).get('training_data')
    if stored is not None:
        return stored
    known = DATASETS.get(model.pretrained_cfg.get('tag') or '')
    return TrainingData(known.name if known else '')


def trained_on(model: MultiExitNet) -> str:
    """timm's name of the data set that a network was trained on.

    Raises:
        InputError: nothing says which.
    """
    name = training_data(model).dataset
    if not name:
        raise InputError('nothing beside these weights names their data set: pass --dataset')
    return name


def describe(
        model: MultiExitNet,
        data: TrainingData,
        class_names: Optional[Sequence[str]],
        **image_config: Any,
) -> None:
    """Makes a network's pretrained cfg that of its training data; commands, costs and cards read it.

    Args:
        model: Changed in place.
        data: What timm has no field for.
        class_names: In the order of the logits; None if unknown.
        **image_config: Fields of the pretrained cfg that differ: input_size, mean, std, interpolation, crop_pct.
    """
    known = next((tag for tag, d in DATASETS.items() if d.name == data.dataset), '')
    model.pretrained_cfg.update(
        image_config, num_classes=model.num_classes, tag=known,
        label_names=None if class_names is None else tuple(class_names))
    vars(model)['training_data'] = data


def config_of(model: MultiExitNet) -> Dict[str, Any]:
    """The content of config.json for a network that `describe` described."""
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / CONFIG_FILE
        save_config_for_hf(model, str(path), model_config={RECORD_KEY: asdict(training_data(model))})
        config = json.loads(path.read_text(encoding='utf-8'))
    names = config['pretrained_cfg'].pop('label_names', None)  # timm reads them from the top of the file
    if names:
        config['label_names'] = names
    return config


def read_config(path: Union[str, Path]) -> Dict[str, Any]:
    """The content of a config.json.

    Raises:
        InputError: it cannot be read, or holds no object.
    """
    config = read_json(path, 'config')
    if not isinstance(config, dict):
        raise InputError(f"config '{path}' must hold an object, not a {type(config).__name__}: check the file")
    return config


def read_training_data(path: Union[str, Path]) -> Optional[TrainingData]:
    """What config.json holds under the key `multiexit`; None if it holds no record.

    Raises:
        InputError: as `read_config`, or the record has unknown fields.
    """
    stored = read_config(path).get(RECORD_KEY)
    if not isinstance(stored, dict) or 'dataset' not in stored:
        return None
    if unknown := stored.keys() - {f.name for f in fields(TrainingData)}:
        raise InputError(f"'{path}' has unknown fields under '{RECORD_KEY}', {', '.join(sorted(unknown))}: update "
                         'timm-multiexit')
    limits = stored.get('value_range')
    return TrainingData(**{**stored, 'value_range': None if limits is None else tuple(limits)})


def find_weights(name: str, checkpoint: Union[str, Path]) -> Tuple[str, str]:
    """What to load: a folder of weights is enough, since the record in it names the network.

    Args:
        name: Name of the network as for `load_model`, '' where the files tell.
        checkpoint: '' or a file or folder of weights.

    Returns:
        The name, 'local-dir:FOLDER' where there is a record, and the file with the weights, '' for the name's own.

    Raises:
        InputError: neither is given, no weights in the folder, or nothing tells which network they are of.
    """
    if not checkpoint:
        if not name:
            raise InputError('which network? Give its name, or --checkpoint with the folder final/ of a run')
        return name, ''
    path = Path(checkpoint)
    if path.is_dir():
        if not (path / WEIGHTS_FILE).is_file():
            final = path / 'final'
            hint = f'give {final}' if (final / WEIGHTS_FILE).is_file() else 'give the folder final/ of a run, or a file'
            raise InputError(f"'{path}' holds no {WEIGHTS_FILE}: {hint}")
        path = path / WEIGHTS_FILE
    elif not path.is_file():
        raise InputError(f"checkpoint '{path}' is not a file or folder: check the name")
    config = path.parent / CONFIG_FILE
    if config.is_file():
        arch = read_config(config).get('architecture', '')
        if name and ':' not in name and name.partition('.')[0] != arch:
            raise InputError(f"'{path}' holds weights of {arch}, not of {name}: leave the name out")
        return f'local-dir:{path.parent}', '' if path.name == WEIGHTS_FILE else str(path)
    name = name or str(load_recipe('', path).get('model', ''))
    if not name:
        raise InputError(f"there is no {CONFIG_FILE} beside '{path}': name the network that it was trained as")
    return name, str(path)
