"""One image's path through a network, as HTML: pure functions of the exits' outputs and the answer.

The elements are in templates/, their layout in style.css; this module adds what depends on the data: states, and
positions in percent.
"""
import base64
import io
import itertools
from pathlib import Path
from typing import List, Optional, Sequence

import jinja2
import numpy as np
from answers import BY_BUDGET, BY_CONFIDENCE, BY_TIME, Answer, ExitOutputs, spoken
from examples import Example
from PIL import Image

from timm_multiexit.stopping.costs import format_macs

LINES = 4  # classes in the line chart; more would be hard to tell apart
BARS = 6  # classes in the bar chart
GAP = 0.82  # least distance of two exits in the pictures, in parts of an even spacing


def data_uri(image: Image.Image) -> str:
    """A small image as a PNG data URI, for <img src>."""
    buffer = io.BytesIO()
    image.save(buffer, 'PNG')
    return 'data:image/png;base64,' + base64.b64encode(buffer.getvalue()).decode()


def percent(p: float) -> str:
    """'57%' for 0.57; values just below 1 are not rounded up to it."""
    return '>99%' if 0.995 <= p < 0.9999 else f'{100 * p:.0f}%'


TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).with_name('templates')), autoescape=True, trim_blocks=True,
    lstrip_blocks=True, undefined=jinja2.StrictUndefined)
TEMPLATES.filters.update(
    data_uri=data_uri, macs=format_macs, percent=percent, spoken=spoken,
    points=lambda points: ' '.join(f'{x:.2f},{y:.2f}' for x, y in points))


def exit_states(num_exits: int, exit_index: int) -> List[str]:
    """State of each exit: those before the answering one ran, those after it were skipped."""
    return ['ran'] * exit_index + ['answered'] + ['not-run'] * (num_exits - exit_index - 1)


def exit_positions(macs: Sequence[float], min_gap: float = 0.) -> List[float]:
    """Position of each exit along the network, 0 to 1, in proportion to its cost.

    Exits closer than `min_gap` are moved apart as little as possible, to keep their labels readable.

    >>> exit_positions([10, 30, 40])
    [0.25, 0.75, 1.0]
    """
    steps = [(b - a) / macs[-1] for a, b in zip([0, *macs], macs)]
    gap = min(min_gap, 1. / len(steps))
    steps = [max(s, gap) for s in steps]
    excess, slack = sum(steps) - 1., sum(steps) - gap * len(steps)
    if excess > 0.:
        steps = [s - (s - gap) * excess / slack if slack > 0. else gap for s in steps]
    return [round(p, 6) for p in itertools.accumulate(steps)]


def at_cost(cost: float, macs: Sequence[float], positions: Sequence[float]) -> float:
    """Position of any cost, interpolated between the exits, 0 to 1."""
    return float(np.interp(cost, [0., *macs], [0., *positions]))


def anytime_view(outputs: ExitOutputs, answer: Answer) -> str:
    """Everything that the controls change, in one piece.

    Stages after the answering exit are drawn empty: they are skipped.
    """
    k, macs, labels = answer.exit_index, outputs.costs.macs, outputs.labels
    positions = exit_positions(macs, GAP / len(macs))
    probabilities = outputs.probabilities(answer.calibrated)
    best, classes = probabilities.max(1), probabilities.amax(0).topk(min(LINES, len(labels))).indices.tolist()
    top = probabilities[k].topk(min(BARS, len(labels)))
    costs = outputs.milliseconds if answer.mode == BY_TIME else macs
    return TEMPLATES.get_template('image.html.jinja').render(
        outputs=outputs, answer=answer, k=k, macs=macs, positions=[100 * x for x in positions],
        exits=[dict(state=state, p=p, label=labels[i]) for state, p, i in zip(
            exit_states(len(macs), k), best.values.tolist(), best.indices.tolist())],
        lines=[dict(label=labels[i], now=float(probabilities[k, i]), points=[
            (100 * x, 100 - 100 * p) for x, p in zip(positions, probabilities[:, i].tolist())]) for i in classes],
        bars=[(labels[i], p) for p, i in zip(top.values.tolist(), top.indices.tolist())],
        limit=f'{answer.limit / 1e6 if answer.mode == BY_BUDGET else answer.limit:g}',
        level=100 * answer.limit if answer.mode == BY_CONFIDENCE else 0.,
        budget_x=100 * at_cost(answer.limit, costs, positions))


def ruler(macs: Sequence[float], low: float, high: float) -> str:
    """Tick marks under the budget slider, one per exit at its cost.

    Args:
        macs: Cumulative MACs of the exits.
        low, high: The slider's ends in MACs.
    """
    marks = ''.join(
        f'<span style="--x:{100 * (m - low) / (high - low):.2f}" title="exit {k + 1}: {format_macs(m)} MACs">'
        f'{k + 1}</span>' for k, m in enumerate(macs))
    return f'<div class="ruler" aria-hidden="true">{marks}</div>'


def example_cards(examples: Sequence[Example], chosen: Optional[int]) -> str:
    """The example images, sorted by lesson, as buttons; `chosen` is the position of the one shown, or None."""
    groups = itertools.groupby(enumerate(examples), key=lambda item: item[1].lesson)
    return TEMPLATES.get_template('cards.html.jinja').render(
        groups=[(lesson, list(members)) for lesson, members in groups], chosen=chosen)
