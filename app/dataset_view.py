"""The dataset view as HTML: accuracy and exits under an average budget. Pure functions of stored results."""
import math
from html import escape
from typing import List, Sequence, Tuple

from answers import spoken
from examples import Assets, Curve, GalleryImage
from image_view import at_cost, exit_positions, percent

from timm_multiexit import ExitConfig, ExitPolicy
from timm_multiexit.stopping.costs import format_macs


def accuracy_range(curve: Curve) -> Tuple[float, float]:
    """Ends of the accuracy axis in percent, whole numbers around all points."""
    values = [p.accuracy for p in curve.points] + [a for _, a in curve.exits]
    low, high = min(values), max(values)
    margin = max(0.08 * (high - low), 0.1)
    return float(math.floor(low - margin)), float(math.ceil(high + margin))


def _ticks(low: float, high: float, count: int = 4) -> List[float]:
    rough = (high - low) / count
    step = next(s for s in (0.5, 1, 2, 5, 10, 20, 50) if s >= rough or s == 50)
    first = -int(-low // step)
    ticks = []
    while first * step <= high + 1e-9:
        ticks.append(first * step)
        first += 1
    return ticks


def status_text(curve: Curve, budget: float) -> str:
    """One sentence for screen readers."""
    point = curve.at(budget)
    return (f'At an average budget of {format_macs(budget)} MACs, accuracy is {point.accuracy:.1f}%; '
            f'{point.shares[0]:.0%} of images leave at the first exit, {point.shares[-1]:.0%} reach the last.')


def headline(curve: Curve, budget: float, full: float) -> str:
    """Accuracy and savings at the budget, in large type."""
    point = curve.at(budget)
    loss = curve.points[-1].accuracy - point.accuracy
    versus = 'same as the full network' if abs(loss) < 0.05 else (
        f'{abs(loss):.1f} points {"below" if loss > 0 else "above"} the full network')
    return f"""
<div class="verdict alone">
  <div class="says">
    <p class="who">Average budget: {format_macs(budget)} MACs per image</p>
    <p class="what">{point.accuracy:.1f}% <span class="aside">accuracy, {versus}</span></p>
    <p class="why">Measured on {escape(curve.images)}</p>
  </div>
  <dl class="savings">
    <div><dt>saved</dt><dd><b>{percent(max(0., 1. - point.macs / full))}</b> of the full cost</dd></div>
    <div><dt>measured cost</dt><dd><b>{format_macs(point.macs)}</b> MACs per image</dd></div>
    <div><dt>leave at exit 1</dt><dd><b>{percent(point.shares[0])}</b> of images</dd></div>
  </dl>
</div>"""


def curve_chart(curve: Curve, budget: float, full: float) -> str:
    """Accuracy against average cost, with a cursor at the budget and a ring for each exit on its own."""
    low, high = accuracy_range(curve)
    left = 0.9 * curve.points[0].macs

    def x(macs: float) -> float:
        return 100 * (macs - left) / (full - left)

    def y(accuracy: float) -> float:
        return 100 - 100 * (accuracy - low) / (high - low)

    now = curve.at(budget)
    path = ' '.join(f'{x(p.macs):.2f},{y(p.accuracy):.2f}' for p in curve.points)
    rules = ''.join(
        f'<line class="rule" x1="0" x2="100%" y1="{y(t):.2f}%" y2="{y(t):.2f}%"/>'
        f'<text class="tick" x="-8" y="{y(t):.2f}%" text-anchor="end" dy=".35em">{t:g}%</text>'
        for t in _ticks(low, high))
    marks = ''.join(
        f'<text class="tick" x="{x(t):.2f}%" y="100%" dy="1.5em" text-anchor="middle">{t / 1e6:.0f} M</text>'
        for t in (1e6 * t for t in _ticks(left / 1e6, full / 1e6, 5)))
    rings = ''.join(f'<circle class="ring" cx="{x(m):.2f}%" cy="{y(a):.2f}%" r="4.5"><title>exit {k + 1} for all '
                    f'images: {a:.2f}% at {format_macs(m)} MACs</title></circle>'
                    for k, (m, a) in enumerate(curve.exits))
    key = '<span class="ring-key">one exit for all images</span>' if curve.exits else ''
    return f"""
<section class="panel chart">
  <h3>Accuracy and average cost</h3>
  <div class="plot">
    <svg role="img" aria-label="Accuracy rises from {curve.points[0].accuracy:.1f}% to {curve.points[-1].accuracy:.1f}%
      as the average cost rises to {format_macs(full)} MACs">
      {rules}{marks}
      <line class="cursor" x1="{x(now.macs):.2f}%" x2="{x(now.macs):.2f}%" y1="0" y2="100%"/>
      <svg viewBox="0 0 100 100" preserveAspectRatio="none"><polyline class="line" points="{path}"/></svg>
      {rings}<circle class="here" cx="{x(now.macs):.2f}%" cy="{y(now.accuracy):.2f}%" r="7"/>
    </svg>
  </div>
  <p class="key"><span class="line-key">early exits by confidence</span>{key}</p>
</section>"""


def shares_picture(curve: Curve, config: ExitConfig, budget: float) -> str:
    """The network from left to right: how many images reach each exit, and how many leave there."""
    point = curve.at(budget)
    policy = config.policy_for(budget)
    used = policy.exits_in_use
    n, macs = config.num_exits, config.exit_macs
    positions = exit_positions(macs, 0.82 / n)
    left, items = 1., []
    for k, share in enumerate(point.shares):
        start = positions[k - 1] if k else 0.
        if k not in used:
            short, words = 'off', 'not used'
        elif k == used[-1]:
            short, words = 'rest', 'all remaining images'
        else:
            short = f'≥ {policy.thresholds[k]:.3f}'
            words = f'at a confidence of {policy.thresholds[k]:.1%} or more'
        items.append(f"""
<li class="exit ran" style="--from:{100 * start:.2f};--to:{100 * positions[k]:.2f};--left:{max(left, 0.):.4f};
  --p:{100 * share:.2f};--share:{share:.4f}">
  <span class="pipe"></span><span class="stem"></span><span class="node">{k + 1}</span>
  <div class="door"><span class="bar" aria-hidden="true"><span></span></span>
    <span class="p">{100 * share:.0f}%</span><span class="cost" title="{words}">{short}</span>
    <span class="unseen">leave, {words}</span></div>
</li>""")
        left -= share
    x = 100 * at_cost(point.macs, macs, positions)
    return f"""
<section class="panel stream">
  <h3>Where images leave, and the confidence threshold of each exit</h3>
  <div class="picture" style="--n:{n}"><div class="field">
    <div class="flag{" end" if x > 75 else ""}" style="--x:{x:.2f}"><span>average {format_macs(point.macs)}</span></div>
    <ol class="exits" aria-label="Share of images that leave at each exit">{''.join(items)}</ol>
  </div></div>
</section>"""


def gallery_by_exit(images: Sequence[GalleryImage], policy: ExitPolicy) -> List[List[GalleryImage]]:
    """The gallery's images grouped by the exit that answers under a policy, most confident first."""
    groups: List[List[GalleryImage]] = [[] for _ in range(policy.num_exits)]
    for image in images:
        groups[image.exit_under(policy)].append(image)
    for k, group in enumerate(groups):
        group.sort(key=lambda image: -image.confidences[k])
    return groups


def gallery(assets: Assets, policy: ExitPolicy) -> str:
    """A sample of test images under the exit that answers them, easy ones left, hard ones right."""
    if not assets.gallery:
        return ''
    columns = []
    for k, group in enumerate(gallery_by_exit(assets.gallery, policy)):
        tiles = []
        for image in group:
            correct = image.predictions[k] == image.true_class
            text = f'{spoken(image.predictions[k])}, {image.confidences[k]:.0%} confidence' + (
                '' if correct else f'; wrong, true class: {spoken(image.true_class)}')
            x, y = image.tile % assets.columns, image.tile // assets.columns
            tiles.append(f'<li><span class="tile{"" if correct else " wrong"}" role="img" style="--tx:{x};--ty:{y}" '
                         f'title="{escape(text)}" aria-label="{escape(text)}"></span></li>')
        none = 'none of these' if k in policy.exits_in_use else 'not used'
        body = f'<ul>{"".join(tiles)}</ul>' if tiles else f'<p>{none}</p>'
        columns.append(f'<div class="leaving" data-exit="{k + 1}"><h4>exit {k + 1}</h4>{body}</div>')
    return f"""
<section class="panel gallery" style="--n:{policy.num_exits};--columns:{assets.columns}">
  <h3>From easy to hard: {len(assets.gallery)} test images, by the exit that answers</h3>
  <div class="columns">{''.join(columns)}</div>
  <p class="key"><span class="wrong-key">wrong prediction</span> Sampled evenly by mean confidence over the
    test set; exact shares above.</p>
</section>"""


def sprite_style(assets: Assets) -> str:
    """A style element with the gallery's images, sent once per network, not with every move of the slider."""
    if not assets.sprite:
        return '<style></style>'
    return f'<style>.mx .gallery .tile {{ background-image: url({assets.sprite}); }}</style>'


def reliability_diagrams(assets: Assets, calibrated: bool) -> str:
    """A reliability diagram per exit: accuracy against confidence."""
    if not assets.reliability:
        return ''
    plots = []
    for k, exit_bins in enumerate(assets.reliability):
        values = exit_bins['calibrated' if calibrated else 'raw']
        bars = ''.join(
            f'<rect x="{100 * b["from"]:.2f}%" width="{100 * (b["to"] - b["from"]):.2f}%" '
            f'y="{100 - 100 * b["accuracy"]:.2f}%" height="{100 * b["accuracy"]:.2f}%" '
            f'opacity="{0.35 + 0.65 * min(1., 4. * b["share"]):.2f}"/>' for b in values['bins'])
        error = values['calibration_error']
        plots.append(f"""
<figure><svg role="img" aria-label="Exit {k + 1}: calibration error {error:.1f}%">
  <rect class="frame" width="100%" height="100%"/>{bars}<line x1="0" y1="100%" x2="100%" y2="0"/></svg>
  <figcaption><b>exit {k + 1}</b> error {error:.1f}%</figcaption></figure>""")
    mean = sum(r['calibrated' if calibrated else 'raw']['calibration_error'] for r in assets.reliability)
    mean /= len(assets.reliability)
    how = 'with temperature scaling' if calibrated else 'as trained'
    return f"""
<div class="mx"><section class="panel reliability">
  <h3>Calibration <span>{how}, mean calibration error {mean:.1f}%</span></h3>
  <div class="diagrams" style="--n:{len(assets.reliability)}">{''.join(plots)}</div>
  <p class="key">x: confidence; y: accuracy on test images; dashed: perfect calibration; stronger colour:
    more images</p>
</section></div>"""


def budget_view(curve: Curve, config: ExitConfig, assets: Assets, budget: float) -> str:
    """Everything that the average-budget slider changes, in one piece."""
    policy = config.policy_for(budget)
    full = config.exit_macs[-1]
    return (f'<div class="mx budget" data-limit="{budget / 1e6:g}">{headline(curve, budget, full)}<div class="pair">'
            f'{curve_chart(curve, budget, full)}{shares_picture(curve, config, budget)}</div>'
            f'{gallery(assets, policy)}</div>')
