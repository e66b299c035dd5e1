"""One image's path through a network, as HTML: pure functions of the exits' outputs and the answer.

style.css holds the layout; this module adds what depends on the data: text, states, and positions in percent.
"""
import base64
import io
import itertools
from html import escape
from typing import List, Optional, Sequence, Tuple
from urllib.parse import urlencode

from answers import BY_BUDGET, BY_CONFIDENCE, Answer, ExitOutputs, spoken
from PIL import Image

from timm_multiexit.stopping.costs import format_macs

RAN, ANSWERED, NOT_RUN = 'ran', 'answered', 'not-run'
_STATE_WORDS = {RAN: 'continued', ANSWERED: 'answers', NOT_RUN: 'skipped'}
LINES = 4  # classes in the line chart; more would be hard to tell apart


def data_uri(image: Image.Image) -> str:
    """A small image as a PNG data URI, for <img src>."""
    buffer = io.BytesIO()
    image.save(buffer, 'PNG')
    return 'data:image/png;base64,' + base64.b64encode(buffer.getvalue()).decode()


def exit_states(num_exits: int, exit_index: int) -> List[str]:
    """State of each exit: those before the answering one ran, those after it were skipped."""
    return [RAN] * exit_index + [ANSWERED] + [NOT_RUN] * (num_exits - exit_index - 1)


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
    positions = [sum(steps[:k + 1]) for k in range(len(steps))]
    return [round(p, 6) for p in positions]


def at_cost(cost: float, macs: Sequence[float], positions: Sequence[float]) -> float:
    """Position of any cost, interpolated between the exits, 0 to 1."""
    xs, ys = [0., *macs], [0., *positions]
    if cost >= xs[-1]:
        return 1.
    k = max(i for i, x in enumerate(xs) if x <= max(cost, 0.))
    return ys[k] + (ys[k + 1] - ys[k]) * (cost - xs[k]) / (xs[k + 1] - xs[k])


def percent(p: float) -> str:
    """'57%' for 0.57; values just below 1 are not rounded up to it."""
    return '>99%' if 0.995 <= p < 0.9999 else f'{100 * p:.0f}%'


def _mark(label: str, true_class: Optional[str]) -> str:
    if true_class is None:
        return ''
    sign, word = ('✓', 'correct') if label == true_class else ('✗', 'wrong')
    return f'<span class="mark {word}" title="{word}">{sign}<span class="unseen"> {word}</span></span>'


def verdict(outputs: ExitOutputs, answer: Answer) -> str:
    """The answer in large type, and what stopping there saves."""
    k = answer.exit_index
    probability, index = outputs.probabilities(answer.calibrated)[k].max(0)
    label = outputs.labels[int(index)]
    macs, full = outputs.costs.macs[k], outputs.costs.macs[-1]
    ms, full_ms = outputs.milliseconds[k], outputs.milliseconds[-1]
    truth = '' if outputs.true_class is None else (
        f'<p class="truth">True class: <b>{escape(spoken(outputs.true_class))}</b></p>')
    notes = ''.join(f'<li>{escape(note)}</li>' for note in outputs.notes)
    return f"""
<div class="verdict">
  <div class="says">
    <p class="who">Exit {k + 1} of {outputs.num_exits} answers</p>
    <p class="what">{escape(spoken(label))} {_mark(label, outputs.true_class)}
      <span class="aside">{percent(float(probability))} confidence</span></p>
    <p class="why">{escape(answer.reason)}</p>{truth}
  </div>
  <dl class="savings">
    <div><dt>saved</dt><dd><b>{percent(1. - macs / full)}</b> of the full cost</dd></div>
    <div><dt>computed</dt><dd><b>{format_macs(macs)}</b> of {format_macs(full)} MACs</dd></div>
    <div><dt>time on this machine</dt><dd><b>{ms:.1f}</b> of {full_ms:.1f} ms</dd></div>
  </dl>
  {f'<ul class="notes">{notes}</ul>' if notes else ''}
  {permalink(outputs, answer)}
</div>"""


def permalink(outputs: ExitOutputs, answer: Answer) -> str:
    """A link that opens the app in this state; '' for a visitor's own image."""
    if outputs.example is None:
        return ''
    limit = f'{answer.limit / 1e6:g}' if answer.mode == BY_BUDGET else f'{answer.limit:g}'
    query = urlencode(dict(network=outputs.network, image=outputs.example + 1, stop=answer.mode, at=limit))
    return f'<a class="permalink" href="?{escape(query)}">Link to this view</a>'


def exits_picture(outputs: ExitOutputs, answer: Answer) -> str:
    """The network from left to right: the image, the stages that ran, and the prediction of each exit.

    Bars show the exits' confidences. Stages after the answering exit are drawn empty: they are skipped.
    """
    macs, n = outputs.costs.macs, outputs.num_exits
    positions = exit_positions(macs, 0.82 / n)
    probabilities = outputs.probabilities(answer.calibrated)
    items = []
    for k, state in enumerate(exit_states(n, answer.exit_index)):
        p, index = probabilities[k].max(0)
        label = outputs.labels[int(index)]
        start = positions[k - 1] if k else 0.
        items.append(f"""
<li class="exit {state}" style="--from:{100 * start:.2f};--to:{100 * positions[k]:.2f};--p:{100 * float(p):.1f}">
  <span class="pipe"></span><span class="stem"></span><span class="node">{k + 1}</span>
  <div class="door">
    <span class="bar" aria-hidden="true"><span></span></span>
    <span class="p">{percent(float(p))}</span>
    <span class="label" title="{escape(spoken(label))}">{escape(spoken(label))}
      {_mark(label, outputs.true_class)}</span>
    <span class="cost">{macs[k] / 1e6:.1f} M</span>
    <span class="state">{_STATE_WORDS[state]}</span>
  </div>
</li>""")
    if answer.mode == BY_BUDGET:
        x = 100 * at_cost(answer.limit, macs, positions)
        end = ' end' if x > 75. else ''
        limit = f'<div class="flag{end}" style="--x:{x:.2f}"><span>budget {format_macs(answer.limit)}</span></div>'
    else:
        limit = (f'<div class="level" style="--level:{100 * answer.limit:.1f}" '
                 f'data-label="stop at {percent(answer.limit)}"></div>')
    size = f'{outputs.input_image.width} × {outputs.input_image.height}'
    levelled = ' levelled' if answer.mode == BY_CONFIDENCE else ''
    return f"""
<div class="picture{levelled}" style="--n:{n};--level:{100 * answer.limit if levelled else 0:.1f}">
  <figure class="seen">
    <img src="{data_uri(outputs.input_image)}" alt="Network input, {size} pixels">
    <figcaption>network input: {size}</figcaption>
  </figure>
  <div class="field">
    {limit}
    <ol class="exits" aria-label="Exits, shallow to deep">{''.join(items)}</ol>
  </div>
  {timeline(outputs, answer, positions)}
  <p class="legend" aria-hidden="true"><span class="ran">continued</span><span class="answered">answered</span>
    <span class="not-run">skipped (what it would have predicted)</span></p>
</div>"""


def timeline(outputs: ExitOutputs, answer: Answer, positions: Sequence[float]) -> str:
    """Line chart of the top classes' probabilities over the exits, aligned with them."""
    probabilities = outputs.probabilities(answer.calibrated)
    classes = outputs.top_classes(LINES, answer.calibrated)
    k = answer.exit_index
    lines, dots, legend = [], [], []
    for c, index in enumerate(classes):
        points = [(100 * x, 100 - 100 * float(p)) for x, p in zip(positions, probabilities[:, index])]
        for part, name in ((points[:k + 1], ''), (points[k:], ' later')):
            if len(part) > 1:
                path = ' '.join(f'{x:.2f},{y:.2f}' for x, y in part)
                lines.append(f'<polyline class="line c{c}{name}" points="{path}"/>')
        dots += [f'<circle class="dot c{c}{" later" if i > k else ""}" cx="{x:.2f}%" cy="{y:.2f}%" r="3.5"/>'
                 for i, (x, y) in enumerate(points)]
        now = percent(float(probabilities[k, index]))
        legend.append(f'<li class="c{c}"><span>{escape(spoken(outputs.labels[index]))}</span> {now}</li>')
    rules = ''.join(f'<line class="rule" x1="0" x2="100%" y1="{y}%" y2="{y}%"/>' for y in (0, 50, 100))
    title = 'Probability of ' + ', '.join(spoken(outputs.labels[i]) for i in classes) + ' at each exit'
    return f"""
<div class="timeline">
  <ul class="classes" aria-label="Probabilities at the answering exit">{''.join(legend)}</ul>
  <div class="plot">
    <svg role="img" aria-label="{escape(title)}">
      {rules}<line class="now" x1="{100 * positions[k]:.2f}%" x2="{100 * positions[k]:.2f}%" y1="-12" y2="100%"/>
      <svg viewBox="0 0 100 100" preserveAspectRatio="none">{''.join(lines)}</svg>
      {''.join(dots)}
    </svg>
    <span class="axis top">100%</span><span class="axis bottom">0%</span>
  </div>
</div>"""


def probability_bars(outputs: ExitOutputs, answer: Answer, count: int = 6) -> str:
    """Class probabilities at the answering exit, largest first."""
    row = outputs.probabilities(answer.calibrated)[answer.exit_index]
    top = row.topk(min(count, len(row)))
    bars = []
    for p, index in zip(top.values.tolist(), top.indices.tolist()):
        label = outputs.labels[index]
        mark = _mark(label, outputs.true_class) if label == outputs.true_class else ''
        bars.append(
            f'<li style="--p:{100 * p:.2f}"><span class="label">{escape(spoken(label))} {mark}</span>'
            f'<span class="bar" aria-hidden="true"><span></span></span><span class="p">{100 * p:.1f}%</span></li>')
    return f"""
<section class="probabilities">
  <h3>Class probabilities at exit {answer.exit_index + 1}</h3><ol>{''.join(bars)}</ol>
</section>"""


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


def anytime_view(outputs: ExitOutputs, answer: Answer) -> str:
    """Everything that the controls change, in one piece."""
    limit = answer.limit / 1e6 if answer.mode == BY_BUDGET else answer.limit
    return (f'<div class="mx anytime" data-exit="{answer.exit_index + 1}" data-limit="{limit:g}">'
            f'{verdict(outputs, answer)}'
            f'{exits_picture(outputs, answer)}{probability_bars(outputs, answer)}</div>')


def example_cards(examples: Sequence[Tuple[Image.Image, str, str]], chosen: Optional[int]) -> str:
    """The example images, grouped by lesson: buttons with image and true class.

    Args:
        examples: Image, true class and lesson of each, sorted by lesson.
        chosen: Position of the image shown, or None.
    """
    groups = []
    for lesson, members in itertools.groupby(enumerate(examples), key=lambda item: item[1][2]):
        cards = ''.join(
            f'<button type="button" data-index="{i}" aria-pressed="{"true" if i == chosen else "false"}">'
            f'<img src="{data_uri(image)}" alt=""><span class="label">{escape(spoken(true_class))}</span></button>'
            for i, (image, true_class, _) in members)
        title = escape(lesson or 'test images')
        groups.append(f'<div class="lesson" role="group" aria-label="{title}"><h3>{title}</h3>'
                      f'<div class="pair-of-cards">{cards}</div></div>')
    return f'<div class="mx cards">{"".join(groups)}</div>'
