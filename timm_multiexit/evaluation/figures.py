"""The two figures of a report: accuracy of each exit, and accuracy under average budgets."""
from typing import Any, Dict

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..stopping.scores import interpolate

BLUE, ORANGE, GREEN, GREY = '#0b5394', '#d9730d', '#3d8b40', '#7a7a7a'


def _style(ax: Axes) -> None:
    ax.grid(True, color='#e3e3e3', linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[['top', 'right']].set_visible(False)


def _subject(results: Dict[str, Any]) -> str:
    return ', '.join(str(results[k]) for k in ('model', 'dataset') if results.get(k))


def anytime_figure(results: Dict[str, Any]) -> Figure:
    """Test accuracy of each exit against its multiply-adds, from the results of `evaluation.evaluate`."""
    macs = [e['macs'] / 1e6 for e in results['exits']]
    accuracies = [e['accuracy'] for e in results['exits']]
    figure = Figure(figsize=(6.4, 4.2), layout='constrained')
    ax = figure.add_subplot()
    _style(ax)
    ax.plot(macs, accuracies, 'o-', color=BLUE)
    for k, (x, y) in enumerate(zip(macs, accuracies)):
        # On the side where the line to the next exit does not run.
        falls = k + 1 < len(macs) and accuracies[k + 1] < y
        place = dict(xytext=(3, 5), va='bottom') if falls else dict(xytext=(3, -5), va='top')
        ax.annotate(f'exit {k + 1}\n{y:.2f}', (x, y), textcoords='offset points', ha='left', fontsize=8, **place)
    ax.margins(x=0.1, y=0.2)
    ax.set_xlabel('multiply-adds for one image (M)')
    ax.set_ylabel('top-1 accuracy (%)')
    _title(figure, 'Anytime', results)
    return figure


def budgeted_figure(results: Dict[str, Any]) -> Figure:
    """Test accuracy against average multiply-adds, and below it what the others gain over the geometric rule."""
    figure = Figure(figsize=(6.4, 5.6), layout='constrained')
    ax, below = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1))
    for axis in (ax, below):
        _style(axis)
    curves = {}
    for method, rows in results['budgeted'].items():
        curves[method] = [[r['average_macs'] / 1e6 for r in rows], [r['accuracy'] for r in rows]]
    ax.plot(*_columns(results['oracle'], 'average_macs'), ':', color=GREY, label='oracle: stops at first right exit')
    ax.plot(*curves['search'], '-', color=BLUE, linewidth=2, label='thresholds by search')
    ax.plot(*curves['geometric'], '--', color=ORANGE, linewidth=1.6, label='thresholds by the geometric rule')
    ax.plot(*curves['fast'], '-', color=GREEN, linewidth=1., label='fast: few exits asked')
    ax.plot(*_columns(results['exits'], 'macs'), 'o', color='black', markersize=4, label='all images at one exit')
    ax.set_ylabel('top-1 accuracy (%)')
    ax.legend(frameon=False, fontsize=8, loc='lower right')
    _title(figure, 'Average budgets', results)

    below.axhline(0., color=ORANGE, linestyle='--', linewidth=1.6)
    for method, color, width in (('fast', GREEN, 1.), ('search', BLUE, 2.)):
        macs, accuracy = np.array(curves[method])
        below.plot(macs, accuracy - interpolate(*curves['geometric'], macs), '-', color=color, linewidth=width)
    below.set_ylabel('minus rule\n(points)')
    below.set_xlabel('average multiply-adds for one image (M)')
    return figure


def _title(figure: Figure, kind: str, results: Dict[str, Any]) -> None:
    # Over the whole figure: a long name would not fit over the axes.
    figure.suptitle(f"{kind}: {_subject(results)}, {results['test_images']:,} test images", fontsize=10)


def _columns(rows, x: str):
    return [r[x] / 1e6 for r in rows], [r['accuracy'] for r in rows]
