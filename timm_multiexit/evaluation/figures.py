"""The figures of a report, accuracy of each exit and under average budgets, of one network or of several."""
from typing import TYPE_CHECKING, Sequence, Tuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .published import PUBLISHED
from .results import Results, curve

if TYPE_CHECKING:
    from .compare import Entry

BLUE, GREY = '#0b5394', '#7a7a7a'
# Apart for people with any colour vision (Okabe and Ito), and each with a mark of its own.
COLOURS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '#000000', '#8a7a00')
MARKS = 'osD^vPX*'
LINES = ('-', '--', ':')  # after eight networks
DASHES = ((4, 2), (1, 1.5), (6, 2, 1, 2), (3, 1, 1, 1, 1, 1))


def _style(ax: Axes) -> None:
    ax.grid(True, color='#e3e3e3', linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[['top', 'right']].set_visible(False)


def anytime_figure(results: Results) -> Figure:
    """Test accuracy of each exit against its multiply-adds."""
    macs, accuracies = _exits(results)
    figure = Figure(figsize=(6.4, 4.2), layout='constrained')
    ax = figure.add_subplot()
    _style(ax)
    ax.plot(macs, accuracies, 'o-', color=BLUE)
    for k, (x, y) in enumerate(zip(macs, accuracies)):
        # Clear of the line to the next exit.
        falls = k + 1 < len(macs) and accuracies[k + 1] < y
        place = dict(xytext=(3, 5), va='bottom') if falls else dict(xytext=(3, -5), va='top')
        ax.annotate(f'exit {k + 1}\n{y:.2f}', (x, y), textcoords='offset points', ha='left', fontsize=8, **place)
    ax.margins(x=0.1, y=0.2)
    ax.set_xlabel('multiply-adds for one image (M)')
    ax.set_ylabel('top-1 accuracy (%)')
    _title(figure, 'Anytime', results)
    return figure


def budgeted_figure(results: Results) -> Figure:
    """Test accuracy against average multiply-adds."""
    figure = Figure(figsize=(6.4, 4.6), layout='constrained')
    ax = figure.add_subplot()
    _style(ax)
    macs, accuracy = curve(results.budgeted)
    ideal = [o.average_macs / 1e6 for o in results.oracle], [o.accuracy for o in results.oracle]
    ax.plot(*ideal, ':', color=GREY, label='oracle: stops at the first correct exit')
    ax.plot(macs / 1e6, accuracy, '-', color=BLUE, linewidth=2, label='early exits by confidence')
    ax.plot(*_exits(results), 'o', color='black', markersize=4, label='all images at one exit')
    ax.set_ylabel('top-1 accuracy (%)')
    ax.set_xlabel('average multiply-adds for one image (M)')
    ax.legend(frameon=False, fontsize=8, loc='lower right')
    _title(figure, 'Average budgets', results)
    return figure


def comparison_figure(entries: 'Sequence[Entry]', kind: str) -> Figure:
    """Several networks in one figure, with the published curves for their data set as thin lines.

    Of a network with several runs the mean, over a band from the lowest to the highest.

    Args:
        entries: Measured on the same images.
        kind: 'anytime', each exit; 'budgeted', average multiply-adds; 'time', average milliseconds.
    """
    figure = Figure(figsize=(6.8, 4.8), layout='constrained')
    ax = figure.add_subplot()
    _style(ax)
    published = [c for c in PUBLISHED.get(entries[0].results.dataset, ()) if c.mode == kind]
    for work, dashes in zip(published, DASHES):
        ax.plot(*zip(*work.points), color=GREY, linewidth=1, dashes=dashes, label=f'published: {work.work}')
    if kind == 'anytime':  # the same under every rule
        entries = list({entry.network: entry for entry in reversed(entries)}.values())[::-1]
    for i, entry in enumerate(entries):
        points = entry.exits() if kind == 'anytime' else entry.curve(kind == 'time')
        costs, mean, low, high = points[:, np.argsort(points[0], kind='stable')]
        costs = costs / (1. if kind == 'time' else 1e6)
        name = entry.network if kind == 'anytime' else entry.name
        label = ('' if name[0] != '_' else ' ') + name.replace('$', r'\$')  # to Matplotlib both have a meaning
        if len(entry.runs) > 1:
            label += f' (mean of {len(entry.runs)} runs, lowest to highest)'
            ax.fill_between(costs, low, high, color=COLOURS[i % len(COLOURS)], alpha=0.2, linewidth=0)
        few = len(set(costs)) < 12
        ax.plot(costs, mean, color=COLOURS[i % len(COLOURS)], linestyle=LINES[i // len(COLOURS) % len(LINES)],
                linewidth=1.5 if few else 2, marker=MARKS[i % len(MARKS)] if few else '', markersize=5, label=label)
    ax.set_ylabel('top-1 accuracy (%)')
    ax.set_xlabel({'anytime': 'multiply-adds for one image (M)', 'time': 'average milliseconds for one image'}.get(
        kind, 'average multiply-adds for one image (M)'))
    ax.legend(frameon=False, fontsize=8, loc='lower right')
    first = entries[0].results
    title = {'anytime': 'Anytime', 'budgeted': 'Average budgets', 'time': 'Average time on this machine'}[kind]
    subject = f'{first.dataset}, ' if first.dataset else ''
    figure.suptitle(f'{title}: {subject}{first.test_images:,} test images', fontsize=10)
    return figure


def _title(figure: Figure, kind: str, results: Results) -> None:
    subject = ', '.join(name for name in (results.model, results.dataset) if name)
    # Centred on the figure: a long name does not fit above the axes.
    figure.suptitle(f'{kind}: {subject}, {results.test_images:,} test images', fontsize=10)


def _exits(results: Results) -> Tuple[Sequence[float], Sequence[float]]:
    return [e.macs / 1e6 for e in results.exits], [e.accuracy for e in results.exits]
