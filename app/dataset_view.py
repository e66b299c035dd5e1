"""The dataset view as HTML: accuracy and exits under an average budget. Pure functions of stored results.

The elements are in templates/, as for `image_view`.
"""
import math
from typing import Dict, List, Mapping, Sequence, Tuple

from examples import Assets, Curve, GalleryImage
from image_view import GAP, TEMPLATES, at_cost, exit_positions

from timm_multiexit import ExitPolicy
from timm_multiexit.stopping.costs import format_macs


def accuracy_range(curve: Curve, *others: Curve) -> Tuple[float, float]:
    """Ends of the accuracy axis in percent, whole numbers around all points.

    Others are cut off where they are lower than this curve by more than it rises, lest they flatten it.
    """
    own = [p.accuracy for p in curve.points] + [a for _, a in curve.exits]
    values = own + [p.accuracy for c in others for p in c.points]
    low, high = max(min(values), 2 * min(own) - max(own)), max(values)
    margin = max(0.08 * (high - low), 0.1)
    return float(math.floor(low - margin)), float(math.ceil(high + margin))


def round_step(rough: float) -> float:
    """The smallest step of at least `rough` among 1, 2 and 5 times the powers of ten."""
    magnitude = 10. ** math.floor(math.log10(rough)) if rough > 0. else 0.1
    return next(magnitude * s for s in (1, 2, 5, 10) if magnitude * s >= rough)


def _ticks(low: float, high: float, count: int = 4) -> List[float]:
    step = round_step((high - low) / count)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def status_text(curve: Curve, budget: float) -> str:
    """One sentence for screen readers."""
    point = curve.at(budget)
    return (f'At an average budget of {format_macs(budget)} MACs, accuracy is {point.accuracy:.1f}%; '
            f'{point.shares[0]:.0%} of images leave at the first exit, {point.shares[-1]:.0%} reach the last.')


def _exits(policy: ExitPolicy, shares: Sequence[float]) -> List[Dict]:
    """How many images reach each exit, how many leave there, and at which confidence."""
    used, exits, shares = policy.exits_in_use, [], list(shares)
    for k in range(used[-1]):  # between two stored budgets the shares are those of both, the exits in use are not
        if k not in used:
            shares[k], shares[k + 1] = 0., shares[k] + shares[k + 1]
    shares[used[-1]:] = [sum(shares[used[-1]:])] + [0.] * (len(shares) - 1 - used[-1])
    for k, share in enumerate(shares):
        if k not in used:
            short, words = 'off', 'not used'
        elif k == used[-1]:
            short, words = 'rest', 'all remaining images'
        else:
            short = f'≥ {policy.confidence_at(k):.3f}'
            words = f'at a confidence of {policy.confidence_at(k):.1%} or more'
        reach = max(1. - sum(shares[:k]), 0.)
        exits.append(dict(reach=reach, share=share, short=short, words=words, used=k in used))
    return exits


def gallery_by_exit(images: Sequence[GalleryImage], policy: ExitPolicy) -> List[List[GalleryImage]]:
    """The gallery's images grouped by the exit that answers under a policy, most confident first."""
    groups: List[List[GalleryImage]] = [[] for _ in range(policy.num_exits)]
    for image in images:
        groups[image.exit_under(policy)].append(image)
    for k, group in enumerate(groups):
        group.sort(key=lambda image: -image.confidences[k])
    return groups


def budget_view(
        curve: Curve,
        policy: ExitPolicy,
        macs: Sequence[int],
        assets: Assets,
        budget: float,
        others: Mapping[str, Curve] = {},
) -> str:
    """Everything that the sliders change, in one piece.

    Args:
        curve: Accuracy against average cost.
        policy: Its thresholds and what it promises.
        macs: Cumulative multiply-adds of each exit.
        assets: Images to group by the exit that answers.
        budget: Average MACs per image that the policy was chosen for.
        others: Curves of other networks by name, drawn behind this one's.
    """
    now = curve.at(budget)
    low, high = accuracy_range(curve, *others.values())
    full = macs[-1]
    left = 0.9 * min(c.points[0].macs for c in (curve, *others.values()))
    right = min(max([full, *(c.points[-1].macs for c in others.values())]), 1.5 * full)  # as for the accuracy axis
    positions = exit_positions(macs, GAP / len(macs))
    loss = curve.points[-1].accuracy - now.accuracy

    def x(macs: float) -> float:
        return 100 * (macs - left) / (right - left)

    def y(accuracy: float) -> float:
        return 100 - 100 * (accuracy - low) / (high - low)

    return TEMPLATES.get_template('dataset.html.jinja').render(
        curve=curve, now=now, budget=budget, promise=policy.promise, full=full, assets=assets, x=x, y=y,
        versus='same as the full network' if abs(loss) < 0.05 else (
            f'{abs(loss):.1f} points {"below" if loss > 0 else "above"} the full network'),
        accuracies=_ticks(low, high), costs=_ticks(left / 1e6, right / 1e6, 5),
        line=[(x(p.macs), y(p.accuracy)) for p in curve.points],
        others={name: [(x(p.macs), y(p.accuracy)) for p in c.points] for name, c in others.items()},
        exits=_exits(policy, now.shares),
        positions=[100 * p for p in positions], average_x=100 * at_cost(now.macs, macs, positions),
        groups=gallery_by_exit(assets.gallery, policy))


def sprite_style(assets: Assets) -> str:
    """A style element with the gallery's images, sent once per network, not with every move of the slider."""
    if not assets.sprite:
        return '<style></style>'
    return f'<style>.mx .gallery .tile {{ background-image: url({assets.sprite}); }}</style>'


def reliability_diagrams(assets: Assets, calibrated: bool) -> str:
    """A reliability diagram per exit: accuracy against confidence."""
    if not assets.reliability:
        return ''
    exits = [row['calibrated' if calibrated else 'raw'] for row in assets.reliability]
    return TEMPLATES.get_template('reliability.html.jinja').render(
        exits=exits, calibrated=calibrated, split=assets.split)
