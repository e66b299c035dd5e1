"""The two figures of a report: accuracy of each exit, and accuracy under average budgets."""
from typing import Sequence, Tuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..stopping.scores import interpolate
from .results import Results, curve

BLUE, ORANGE, GREEN, GREY = '#0b5394', '#d9730d', '#3d8b40', '#7a7a7a'


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
    """Test accuracy against average multiply-adds, and below it the gain of the others over the geometric rule."""
    figure = Figure(figsize=(6.4, 5.6), layout='constrained')
    ax, below = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1))
    for axis in (ax, below):
        _style(axis)
    curves = {}
    for method, rows in results.budgeted.items():
        macs, accuracy = curve(rows)
        curves[method] = macs / 1e6, accuracy
    ideal = [o.average_macs / 1e6 for o in results.oracle], [o.accuracy for o in results.oracle]
    ax.plot(*ideal, ':', color=GREY, label='oracle: stops at the first correct exit')
    ax.plot(*curves['search'], '-', color=BLUE, linewidth=2, label='thresholds by search')
    ax.plot(*curves['geometric'], '--', color=ORANGE, linewidth=1.6, label='thresholds by the geometric rule')
    ax.plot(*curves['fast'], '-', color=GREEN, linewidth=1., label='fast: few exits in use')
    ax.plot(*_exits(results), 'o', color='black', markersize=4, label='all images at one exit')
    ax.set_ylabel('top-1 accuracy (%)')
    ax.legend(frameon=False, fontsize=8, loc='lower right')
    _title(figure, 'Average budgets', results)

    below.axhline(0., color=ORANGE, linestyle='--', linewidth=1.6)
    for method, color, width in (('fast', GREEN, 1.), ('search', BLUE, 2.)):
        macs, accuracy = curves[method]
        below.plot(macs, accuracy - interpolate(*curves['geometric'], macs), '-', color=color, linewidth=width)
    below.set_ylabel('minus rule\n(points)')
    below.set_xlabel('average multiply-adds for one image (M)')
    return figure


def _title(figure: Figure, kind: str, results: Results) -> None:
    subject = ', '.join(name for name in (results.model, results.dataset) if name)
    # Centred on the figure: a long name does not fit above the axes.
    figure.suptitle(f'{kind}: {subject}, {results.test_images:,} test images', fontsize=10)


def _exits(results: Results) -> Tuple[Sequence[float], Sequence[float]]:
    return [e.macs / 1e6 for e in results.exits], [e.accuracy for e in results.exits]
