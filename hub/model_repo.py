"""A trained network to publish: its weights and the files beside them, read and checked."""
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict

import torch

from timm_multiexit import ExitConfig, InputError, MultiExitNet, exit_costs, list_networks, load_model
from timm_multiexit.evaluation.results import RESULTS_NAME, Results
from timm_multiexit.files import read_yaml
from timm_multiexit.models._pretrained import WEIGHTS_DIR
from timm_multiexit.pretrained.exit_config import weights_digest
from timm_multiexit.pretrained.hub_files import CONFIG_FILE, WEIGHTS_FILE
from timm_multiexit.pretrained.names import check_name
from timm_multiexit.stopping.config import FILE_NAME, RECIPE_NAME, SCORES_NAME
from timm_multiexit.training.history import LOG_NAME, STEPS_NAME, History

# Default owner of everything that is published; `--org` overrides it.
ORGANISATION = 'timm-multiexit'

_MADE_BY = {
    **dict.fromkeys(
        (WEIGHTS_FILE, CONFIG_FILE, RECIPE_NAME, STEPS_NAME, LOG_NAME),
        'give the folder final/ of a run of train_timm.py'),
    FILE_NAME: 'create it with timm-multiexit calibrate --checkpoint {folder} --data-dir IMAGES',
    SCORES_NAME: 'create it with timm-multiexit calibrate --checkpoint {folder} --data-dir IMAGES',
    RESULTS_NAME: 'create it with timm-multiexit evaluate --checkpoint {folder} --data-dir IMAGES',
}


@dataclass(frozen=True)
class Network:
    """A network with its weights, from the package or a user's folder."""

    name: str  # 'arch.tag', also the repository's name
    folder: Path  # with the weights and the files of `_MADE_BY`
    model: MultiExitNet  # with these weights, in eval mode
    exits: ExitConfig  # costs and scores
    results: Results  # from timm-multiexit evaluate
    recipe: Dict[str, Any]  # options of train_timm.py
    history: History  # the runs that led to it, and itself

    @property
    def tag(self) -> str:
        return self.name.partition('.')[2]

    @property
    def weights(self) -> Path:
        return self.folder / WEIGHTS_FILE


def read_network(given: str, name: str = '') -> Network:
    """Reads a network to publish and checks that the files beside the weights belong to them.

    Args:
        given: 'arch.tag' of the package, or a folder.
        name: Repository name for a folder; '' for the recipe's architecture and dataset.

    Raises:
        InputError: unknown name, a missing file, or files that do not belong together.
    """
    folder = Path(given)
    packaged = not folder.is_dir()
    if packaged:
        if '/' in given or '\\' in given:
            raise InputError(f"'{given}' is not a folder: give one with {WEIGHTS_FILE}, or a name like arch.tag")
        check_name(given)
        if given not in list_networks(pretrained=True):
            trained = ', '.join(list_networks(pretrained=True)) or 'none yet'
            raise InputError(f"the package holds no weights for '{given}': give a folder, or one of {trained}")
        folder = WEIGHTS_DIR / given
    for required, remedy in _MADE_BY.items():
        registered = packaged and required == CONFIG_FILE
        if not registered and not (folder / required).is_file():
            raise InputError(f"'{folder}' has no {required}: {remedy.format(folder=folder)}")
    recipe = read_yaml(folder / RECIPE_NAME, 'recipe')
    if not isinstance(recipe, dict) or not {'model', 'dataset'} <= recipe.keys():
        raise InputError(
            f"'{folder / RECIPE_NAME}' is not a recipe, it names no model and dataset: give the run's own recipe")
    results = Results.load(folder / RESULTS_NAME)
    exits = ExitConfig.load(folder / FILE_NAME)
    history = History.read(folder)
    if packaged:
        name = given
    elif not name:
        name = _default_name(recipe)
    if not re.fullmatch(r'\w+\.[\w-]+', name):
        raise InputError(f"'{name}' is not a repository name: give ARCH.TAG, like msfuse_cifar.flowers")
    model = load_model(name if packaged else f'local-dir:{folder}')
    exits.check_network(model, weights_digest(model))
    costs = exit_costs(model, exits.input_size)
    if tuple(costs.macs) != exits.exit_macs:
        raise InputError(f"the costs in {FILE_NAME} of '{folder}' are not the network's: calibrate it again")
    if [e.macs for e in results.exits] != list(costs.macs):
        raise InputError(f"{RESULTS_NAME} of '{folder}' is of another network: evaluate it again")
    return Network(name, folder, model, exits, results, recipe, history)


def _default_name(recipe: Dict[str, Any]) -> str:
    kind, _, dataset = str(recipe['dataset']).rpartition('/')
    if not kind:  # 'folder' names no dataset
        raise InputError(f"dataset '{recipe['dataset']}' gives no repository name: pass --name ARCH.TAG")
    return f"{str(recipe['model']).partition('.')[0]}.{dataset}"


@torch.inference_mode()
def differences(ours: MultiExitNet, theirs: torch.nn.Module) -> int:
    """Number of exits whose logits differ between two copies of a network, bit for bit, on four fixed images."""
    size = (ours.in_chans, *ours.pretrained_cfg['input_size'][1:])
    images = torch.rand((4, *size), generator=torch.Generator().manual_seed(0))
    if not isinstance(theirs, MultiExitNet) or theirs.num_exits != ours.num_exits:
        return ours.num_exits
    pairs = zip(ours.eval().forward_exits(images), theirs.eval().forward_exits(images))
    return sum(not torch.equal(a, b) for a, b in pairs)
