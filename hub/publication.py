"""The model repository: built from the files beside the weights, then checked."""
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict

import timm
import yaml
from card import build_card
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from model_repo import Network, differences

from timm_multiexit import InputError, load_exit_config
from timm_multiexit.evaluation.results import RESULTS_NAME
from timm_multiexit.files import write_json
from timm_multiexit.optional import require_extra
from timm_multiexit.pretrained.hub_files import CONFIG_FILE, EXAMPLES_FILE, SPRITE_FILE, WEIGHTS_FILE, explain
from timm_multiexit.pretrained.record import config_of
from timm_multiexit.stopping.config import FILE_NAME, RECIPE_NAME, SCORES_NAME
from timm_multiexit.training.history import LOG_NAME, STEPS_NAME, portable

CARD = 'README.md'


def build_folder(network: Network, folder: Path, organisation: str, with_images: bool = False) -> Path:
    """Writes the repository of a network. The output is deterministic, so pushing it again changes nothing.

    Args:
        network: What to publish.
        folder: Where to write; created if missing.
        organisation: Owner of the repository, for the snippets in the card.
        with_images: Whether to include the images beside the weights, which come from the data set.

    Returns:
        The folder.

    Raises:
        InputError: images are wanted and there are none; or matplotlib, which draws the figures, is not installed.
    """
    require_extra('plots', 'a model repository')
    from timm_multiexit.evaluation.figures import anytime_figure, budgeted_figure  # not on top: the Space needs none
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(network.weights, folder / WEIGHTS_FILE)
    for name in (STEPS_NAME, LOG_NAME):
        shutil.copyfile(network.folder / name, folder / name)
    for name in (EXAMPLES_FILE, SPRITE_FILE) if with_images else ():
        if not (network.folder / name).is_file():
            raise InputError(f"'{network.folder}' has no {name}: choose images with app/tools/choose_examples.py")
        shutil.copyfile(network.folder / name, folder / name)
    text, recipe = (network.folder / RECIPE_NAME).read_text(encoding='utf-8'), portable(network.recipe)
    (folder / RECIPE_NAME).write_text(
        text if recipe == network.recipe else yaml.safe_dump(recipe, sort_keys=False), encoding='utf-8')
    write_json(folder / CONFIG_FILE, timm_config(network))
    network.exits.save(folder / FILE_NAME)
    replace(network.results, model=network.name).save(folder / RESULTS_NAME)  # not where it lay on this machine
    for name, draw in (('anytime.png', anytime_figure), ('budgeted.png', budgeted_figure)):
        draw(network.results).savefig(folder / name, dpi=150, metadata={'Software': None})
    (folder / CARD).write_text(str(build_card(network, organisation)), encoding='utf-8')
    return folder


def timm_config(network: Network) -> Dict[str, Any]:
    """timm's config.json, with the record of the training data under the key `multiexit`."""
    config = config_of(network.model)
    config['pretrained_cfg']['tag'] = network.tag
    return config


def check_folder(network: Network, folder: Path) -> str:
    """Loads the folder as a user would, compares the logits, and validates the card.

    Returns:
        A note if the Hub's validator could not be reached, else ''.

    Raises:
        InputError: the folder does not reproduce the network, or the card is not valid.
    """
    place = f'local-dir:{folder}'
    differing = differences(network.model, timm.create_model(place, pretrained=True))
    if differing:
        raise InputError(f'{network.name} loaded from its folder differs in the logits of {differing} exits: '
                         'config.json does not match the weights')
    if load_exit_config(place) != network.exits:
        raise InputError(f'{network.name}: multiexit.json and {SCORES_NAME} do not hold what the weights come with')
    card = ModelCard.load(folder / CARD)
    if [r.metric_value for r in card.data.eval_results or ()] != [e.accuracy for e in network.results.exits]:
        raise InputError(f'the model-index in the card of {network.name} does not hold the measured accuracies')
    return validate_card(card)


def validate_card(card: ModelCard, repo_type: str = 'model') -> str:
    """Validates a card with the Hub's own validator.

    Returns:
        A note if it could not be reached, else ''.

    Raises:
        InputError: it rejects the card.
    """
    try:
        card.validate(repo_type=repo_type)
    except (HfHubHTTPError, HTTPError) as error:
        return f"the Hub did not validate the card: {explain(error)}"
    except ValueError as error:
        raise InputError(f'the Hub rejects the front matter of the card: {error}') from error
    return ''
