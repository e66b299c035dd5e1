"""What the app shows without a dataset: a network's stored results and the images chosen for it."""
import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Sequence, Tuple, Union

import numpy as np
from PIL import Image
from timm.layers import to_2tuple

import timm_multiexit
from timm_multiexit import ExitConfig, ExitPolicy, InputError
from timm_multiexit.evaluation.results import RESULTS_NAME, Results
from timm_multiexit.files import read_json
from timm_multiexit.models._pretrained import WEIGHTS_DIR
from timm_multiexit.pretrained.hub_files import EXAMPLES_FILE, SPRITE_FILE, hub_file
from timm_multiexit.stopping.policy import leaves, log_odds

ASSETS = Path(__file__).resolve().parent / 'assets'
SAMPLES = Path(timm_multiexit.__file__).resolve().parent / 'samples'


@dataclass(frozen=True)
class Example:
    """An image to choose; `lesson` is what it illustrates ('Correct from the start', ...), '' if unknown."""

    image: Image.Image
    true_class: Optional[str]  # None if it is not a class of the network
    lesson: str
    index: Optional[int] = None


@dataclass(frozen=True)
class GalleryImage:
    """An image of the gallery."""

    tile: int  # position in the sprite
    true_class: str
    predictions: Tuple[str, ...]  # class predicted by each exit
    confidences: Tuple[float, ...]  # of each exit, in the measure of the stored scores

    def exit_under(self, policy: ExitPolicy) -> int:
        """Index of the exit at which the image leaves."""
        stops = (k for k, threshold in enumerate(policy.thresholds) if leaves(log_odds(self.confidences[k]), threshold))
        return next(stops, policy.num_exits - 1)


@dataclass(frozen=True)
class Assets:
    """Images and reliability of one network."""

    examples: Tuple[Example, ...]  # for the view of one image
    gallery: Tuple[GalleryImage, ...] = ()  # for the dataset view
    reliability: Tuple[Dict[str, Any], ...] = ()  # per exit the bins, raw and calibrated; empty if not stored
    sprite: str = ''  # the gallery's images in rows, as a data URI, or ''
    columns: int = 1  # images in a row of the sprite
    split: str = 'test'  # which images they are, 'validation' for networks of one's own


def assets_folder(name: str) -> Path:
    """Where the images chosen for a network lie: in the app, or beside a user's own weights."""
    source, _, place = name.partition(':')
    if source == 'hf-hub':
        try:
            hub_file(place, SPRITE_FILE)
            return hub_file(place, EXAMPLES_FILE).parent
        except InputError:  # pushed without --with-images, or out of reach
            pass
    return Path(place) if source == 'local-dir' else ASSETS / name.replace(':', '_')


def load_assets(name: str, labels: Sequence[str]) -> Assets:
    """The images that choose_examples.py chose for a network, else the package's sample images."""
    folder = assets_folder(name)
    if not (folder / EXAMPLES_FILE).is_file():
        return Assets(tuple(_samples(labels)))
    values = read_json(folder / EXAMPLES_FILE, 'examples')
    (width, height), columns = to_2tuple(values['size']), values['columns']
    with Image.open(folder / SPRITE_FILE) as image:
        sprite = image.convert('RGB')

    def tile(i: int) -> Image.Image:
        x, y = width * (i % columns), height * (i // columns)
        return sprite.crop((x, y, x + width, y + height))

    examples = tuple(Example(tile(e['tile']), e['true_class'], e['lesson'], e['index']) for e in values['examples'])
    examples = examples or tuple(_samples(labels))  # no image teaches any of the lessons
    gallery = tuple(GalleryImage(g['tile'], g['true_class'], tuple(g['predictions']), tuple(g['confidences']))
                    for g in values['gallery'])
    encoded = base64.b64encode((folder / SPRITE_FILE).read_bytes()).decode()
    return Assets(examples, gallery, tuple(values['reliability']), f'data:image/png;base64,{encoded}', columns,
                  values['split'])


def _samples(labels: Sequence[str]) -> Iterator[Example]:
    for path in sorted(SAMPLES.glob('*.png')):
        *_, index, shown = path.stem.split('_', 3)  # dataset_split_index_class
        with Image.open(path) as image:
            yield Example(image.convert('RGB'), shown if shown in labels else None, '', int(index))


@dataclass(frozen=True)
class CurvePoint:
    """Results at one average budget: MACs per image, accuracy in percent, share of images leaving at each exit."""

    macs: float
    accuracy: float
    shares: Tuple[float, ...]


@dataclass(frozen=True)
class Curve:
    """Accuracy against average cost."""

    images: str  # what it was measured on, in words
    budgets: Tuple[float, ...]  # average MACs, rising
    points: Tuple[CurvePoint, ...]  # one per budget
    exits: Tuple[Tuple[float, float], ...] = ()  # (MACs, accuracy) of each exit alone, or empty

    def at(self, budget: float) -> CurvePoint:
        """The point at a budget, interpolated between the stored ones."""
        columns = zip(*((p.macs, p.accuracy, *p.shares) for p in self.points))
        macs, accuracy, *shares = (float(np.interp(budget, self.budgets, column)) for column in columns)
        return CurvePoint(macs, accuracy, tuple(shares))


def load_curve(name: str, config: ExitConfig) -> Optional[Curve]:
    """The curve on test images from results.json for the package's weights, else on the validation images whose scores
    are stored; None if there are neither.
    """
    if config.scores is None:
        return None
    path = WEIGHTS_DIR / name / RESULTS_NAME
    if ':' not in name and path.is_file():
        results = Results.load(path)
        rows = results.budgeted
        return Curve(
            f'{results.test_images:,} test images', tuple(r.budget for r in rows),
            tuple(CurvePoint(r.average_macs, r.accuracy, r.exit_shares) for r in rows),
            tuple((e.macs, e.accuracy) for e in results.exits))
    policies = config.policies()
    points = tuple(CurvePoint(p.expected_macs, p.expected_accuracy or 0., p.exit_shares) for p in policies.values())
    return Curve('the validation images', tuple(policies), points)


def parse_position(number: Union[str, int, None], count: int) -> int:
    """Position of an example from its number, such as that of a link; the first if there is no such example.

    >>> parse_position('3', 8), parse_position('x', 8), parse_position(None, 8)
    (2, 0, 0)
    """
    try:
        position = int(number or 1) - 1
    except (TypeError, ValueError):
        return 0
    return position if 0 <= position < count else 0
