"""Event handlers of the page and the API: from the controls' values to what is shown. They keep no visitor state."""
import functools
import math
import threading
from typing import Any, Callable, Dict, List, Optional, Tuple

import dataset_view
import gradio as gr
import image_view
from answers import (
    BY_BUDGET,
    BY_CONFIDENCE,
    BY_LOSS,
    BY_TIME,
    Answer,
    ExitOutputs,
    answer_by_confidence,
    answer_within_budget,
    answer_within_time,
    describe,
)
from answers import status_text as answer_text
from examples import Assets, Curve, load_assets, load_curve, parse_position
from served import Network, get_network, served_names

from timm_multiexit import InputError, load_exit_config
from timm_multiexit.inference.images import check_sent
from timm_multiexit.stopping.costs import parse_macs
from timm_multiexit.stopping.policy import CALIBRATE_HINT

MEGA = 1e6
CONFIDENCE = 0.9
_decoding = threading.Semaphore(2)  # bounds the memory that it takes


def clear_errors(function: Callable) -> Callable:
    """Shows bad input as a message in the page, or to the API's caller, instead of a traceback."""
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except InputError as error:
            raise gr.Error(str(error), print_exception=False) from error
    return wrapper


@functools.cache
def stored_for(name: str) -> Tuple[Network, Assets, Optional[Curve]]:
    """A network, its test images, and its accuracy curve if results are stored."""
    network = get_network(name)
    curve = None if network.config is None else load_curve(name, network.config)
    return network, load_assets(name, network.labels), curve


@functools.cache
def other_curves(name: str) -> Dict[str, Curve]:
    """Curves of the other networks served for the same classes and measured on the same images, by architecture."""
    network, _, curve = stored_for(name)
    others = {}
    for other in served_names():
        if other == name:
            continue
        try:
            config = load_exit_config(other)
        except InputError:  # none is stored, or its own page tells what is wrong
            continue
        if config.class_names == network.config.class_names:
            theirs = load_curve(other, config)
            if theirs is not None and theirs.images == curve.images:
                others[other if ':' in other else other.partition('.')[0]] = theirs
    return others


def slider_range(macs: Tuple[int, ...]) -> Tuple[float, float, float]:
    """Range and step of a budget slider in millions of MACs, with about a hundred positions.

    >>> slider_range((15_260_000, 64_220_000))
    (15.5, 64.5, 0.5)
    """
    low, high = macs[0] / MEGA, macs[-1] / MEGA
    step = dataset_view.round_step((high - low) / 100)
    return tuple(round(v, 6) for v in (math.ceil(low / step) * step, math.ceil(high / step) * step, step))


def run_file(name: str, path: str) -> ExitOutputs:
    """Runs a network on an uploaded file."""
    network = get_network(name)
    with _decoding:
        check_sent(path)
        return network.run(path)


def read_macs(text: object) -> float:
    """Multiply-adds that a caller gave."""
    if not isinstance(text, (str, int, float)) or len(str(text)) > 30:
        raise InputError('not a number of MACs: write it like 30M or 3e7')
    return parse_macs(text)


def run_example(name: str, position: int) -> ExitOutputs:
    """Runs a network on one of its examples."""
    network, assets, _ = stored_for(name)
    example = assets.examples[position]
    return network.run(example.image, example.true_class, example=position)


def answer_for(
        outputs: ExitOutputs, mode: str, budget: float, time: float, confidence: float, calibrated: bool) -> Answer:
    """The answer under the controls' values; `budget` in millions of MACs, `time` in milliseconds."""
    if mode == BY_TIME:
        return answer_within_time(outputs, time, calibrated)
    if mode == BY_CONFIDENCE:
        return answer_by_confidence(outputs, confidence, calibrated)
    if budget is None:
        raise InputError('no budget given: enter one in millions of MACs')
    return answer_within_budget(outputs, budget * MEGA, calibrated)


def cards(name: str, chosen: Optional[int]) -> str:
    return image_view.example_cards(stored_for(name)[1].examples, chosen)


# Events of the page


@clear_errors
def update_view(
        outputs: Optional[ExitOutputs], mode: str, budget: float, time: float, confidence: float, calibrated: bool):
    """The view and its status text under the controls' values. No model runs."""
    if outputs is None:
        return gr.skip(), gr.skip()
    answer = answer_for(outputs, mode, budget, time, confidence, calibrated)
    return image_view.anytime_view(outputs, answer), answer_text(outputs, answer)


@clear_errors
def choose_example(name: str, answered: int, event: gr.EventData):
    """The chosen card's outputs and the choice's number; nothing if a later choice was already answered."""
    if event.order < answered:
        return gr.skip(), gr.skip()
    return run_example(name, parse_position(event.index + 1, len(stored_for(name)[1].examples))), event.order


@clear_errors
def choose_file(name: str, path: Optional[str]) -> Optional[ExitOutputs]:
    return None if path is None else run_file(name, path)


def accept_file(name: str, outputs: Optional[ExitOutputs]):
    """A file's outputs, without a card chosen; nothing if another network was chosen while it ran."""
    if outputs is None or outputs.network != name:
        return gr.skip(), gr.skip()
    return outputs, cards(name, None)


def switch_mode(mode: str):
    return [gr.update(visible=mode == shown) for shown in (BY_BUDGET, BY_BUDGET, BY_TIME, BY_CONFIDENCE)]


def switch_data_mode(mode: str):
    return [gr.update(visible=mode == shown) for shown in (BY_BUDGET, BY_BUDGET, BY_LOSS)]


def may_promise(network: Network) -> bool:
    """Whether scores of certification images are stored, with which a loss can be bounded."""
    scores = None if network.config is None else network.config.scores
    return scores is not None and bool(scores.certification.any())


@clear_errors
def data_page(name: str, mode: str, average_budget: Optional[float], max_loss: Optional[float]):
    """The dataset view and its status text: at an average budget in millions of MACs, or at the cheapest policy that
    surely loses at most so many points.
    """
    network, assets, curve = stored_for(name)
    if curve is None:
        return ('<div class="mx"><p class="panel">No exit config is stored with these weights. Create one with '
                'timm-multiexit calibrate.</p></div>'), ''
    if mode == BY_LOSS and may_promise(network):
        if max_loss is None:
            raise InputError('no loss given: enter one in points')
        policy = network.config.policy_for(max_loss=max_loss)
        return (dataset_view.budget_view(
                    curve, policy, network.costs.macs, assets, policy.expected_macs, other_curves(name)),
                dataset_view.status_text(curve, policy.expected_macs))
    if average_budget is None:
        raise InputError('no budget given: enter one in millions of MACs')
    macs = network.costs.macs
    budget = min(max(average_budget * MEGA, macs[0]), macs[-1])  # the slider's ends are rounded outwards
    return (dataset_view.budget_view(
                curve, network.config.policy_for(budget), macs, assets, budget, other_curves(name)),
            dataset_view.status_text(curve, budget))


def reliability(name: str, calibrated: bool) -> str:
    return dataset_view.reliability_diagrams(stored_for(name)[1], calibrated)


@clear_errors
def open_network(
        name: str, position: int = 0, mode: str = BY_BUDGET, limit: Optional[float] = None,
        calibrated: Optional[bool] = None):
    """All components for a network with one of its examples: one value per output."""
    network, assets, curve = stored_for(name)
    macs = network.costs.macs
    low, high, step = slider_range(macs)
    middle = round((macs[0] + 0.3 * (macs[-1] - macs[0])) / MEGA / step) * step
    budget = limit if mode == BY_BUDGET and limit is not None else middle
    confidence = limit if mode == BY_CONFIDENCE and limit is not None else CONFIDENCE
    # In hundredths, rounded so that the first exit and the whole network are in reach.
    first, last = math.ceil(100 * network.milliseconds[0]) / 100, math.ceil(100 * network.milliseconds[-1]) / 100
    time = limit if mode == BY_TIME and limit is not None else round((first + last) / 2, 2)
    outputs = run_example(name, position)
    ruler = image_view.ruler(macs, low * MEGA, high * MEGA)
    page, status = data_page(name, BY_BUDGET, middle, None)
    return (
        name, outputs, cards(name, position), mode,
        gr.update(minimum=low, maximum=high, step=step, value=min(max(budget, low), high), visible=mode == BY_BUDGET),
        gr.update(value=ruler, visible=mode == BY_BUDGET),
        gr.update(minimum=first, maximum=last, value=min(max(time, first), last), visible=mode == BY_TIME),
        gr.update(value=min(max(confidence, 0.2), 1.), visible=mode == BY_CONFIDENCE),
        gr.skip() if calibrated is None else calibrated,
        gr.update(value=BY_BUDGET, visible=may_promise(network)),
        gr.update(minimum=low, maximum=high, step=step, value=middle, visible=curve is not None),
        gr.update(value=ruler, visible=curve is not None), gr.update(visible=False),
        page, status, dataset_view.sprite_style(assets), reliability(name, True),
        gr.update(value=True, visible=bool(assets.reliability)), None)


def open_page(names: List[str], query: Dict[str, str]):
    """The page in the state of a link: ?network=...&image=3&stop=budget&at=30&raw=1 (each part is optional)."""
    name = query.get('network') if query.get('network') in names else names[0]
    position = parse_position(query.get('image'), len(stored_for(name)[1].examples))
    mode = query['stop'] if query.get('stop') in (BY_TIME, BY_CONFIDENCE) else BY_BUDGET
    try:
        limit = float(query['at'])
    except (KeyError, ValueError):
        limit = None
    limit = limit if limit is not None and math.isfinite(limit) else None
    return open_network(name, position, mode, limit, 'raw' not in query)


# The API


@clear_errors
def classify(
        image: Optional[str], network: str, budget: str = '', confidence: Optional[float] = None,
        calibrated: bool = True) -> Dict[str, Any]:
    """Classifies an image with a multi-exit network: the prediction of every exit and which one answers.

    Args:
        image: The image file.
        network: A name from `networks`.
        budget: Multiply-adds for this image, like '30M' or '3e7': the deepest exit within it answers.
        confidence: Instead of a budget: the first exit whose largest probability reaches this answers.
        calibrated: Whether to apply the stored temperatures.
    """
    if image is None:
        raise InputError('no image given: send a PNG, JPEG, WebP or other image file')
    if budget and confidence is not None:
        raise InputError('give a budget or a confidence, not both')
    wanted = read_macs(budget) if budget else None
    outputs = run_file(network, image)
    if confidence is not None:
        answer = answer_by_confidence(outputs, confidence, calibrated)
    else:
        answer = answer_within_budget(outputs, outputs.costs.macs[-1] if wanted is None else wanted, calibrated)
    return describe(outputs, answer)


@clear_errors
def policy(network: str, average_budget: str) -> Dict[str, Any]:
    """The confidence thresholds for an average cost per image.

    Args:
        network: A name from `networks`.
        average_budget: Average multiply-adds per image, like '30M' or '3e7'.
    """
    config = get_network(network).config
    if config is None:
        raise InputError(f"no exit config is stored for '{network}': {CALIBRATE_HINT}")
    policy = config.policy_for(read_macs(average_budget))
    return dict(confidences=[policy.confidence_at(k) for k in range(policy.num_exits)], **policy.to_dict())
