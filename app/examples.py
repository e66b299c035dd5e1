"""What the app shows without a dataset: a network's stored results and the test images chosen for it."""
import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Tuple

import numpy as np
from PIL import Image

import timm_multiexit
from timm_multiexit import ExitConfig, ExitPolicy, InputError
from timm_multiexit.evaluation.results import RESULTS_NAME, Results
from timm_multiexit.files import read_json
from timm_multiexit.models._pretrained import WEIGHTS_DIR
from timm_multiexit.stopping.policy import leaves

ASSETS = Path(__file__).resolve().parent / 'assets'
SAMPLES = Path(timm_multiexit.__file__).resolve().parent / 'samples'
EXAMPLES_FILE, SPRITE_FILE = 'examples.json', 'images.png'


@dataclass(frozen=True)
class Example:
    """A test image to choose; `lesson` is what it illustrates ('Correct from the start', ...), '' if unknown."""

    image: Image.Image
    true_class: str
    lesson: str
    index: Optional[int] = None


@dataclass(frozen=True)
class GalleryImage:
    """A test image of the gallery.

    Attributes:
        tile: Position in the sprite.
        true_class: Name of the true class.
        predictions: Class predicted by each exit.
        confidences: Confidence of each exit, in the measure of the stored policies.
    """

    tile: int
    true_class: str
    predictions: Tuple[str, ...]
    confidences: Tuple[float, ...]

    def exit_under(self, policy: ExitPolicy) -> int:
        """Index of the exit at which the image leaves."""
        stops = (k for k, threshold in enumerate(policy.thresholds[:-1]) if leaves(self.confidences[k], threshold))
        return next(stops, policy.num_exits - 1)


@dataclass(frozen=True)
class Assets:
    """Test images and reliability of one network.

    Attributes:
        examples: For the view of one image.
        gallery: For the dataset view.
        reliability: Per exit the bins (confidence, accuracy, share), raw and calibrated; empty if not stored.
        sprite: The gallery's images in rows, as a data URI, or ''.
        columns: Images in a row of the sprite.
    """

    examples: Tuple[Example, ...]
    gallery: Tuple[GalleryImage, ...] = ()
    reliability: Tuple[Dict[str, Any], ...] = ()
    sprite: str = ''
    columns: int = 1


def load_assets(name: str, labels: Sequence[str]) -> Assets:
    """The images that choose_examples.py chose for a network, else the package's sample images.

    Args:
        name: 'arch.tag'.
        labels: Class names of the network; samples of other classes are left out.
    """
    folder = ASSETS / name
    if ':' in name or not (folder / EXAMPLES_FILE).is_file():
        return Assets(_samples(labels))
    values = read_json(folder / EXAMPLES_FILE, 'examples')
    size, columns = values['size'], values['columns']
    with Image.open(folder / SPRITE_FILE) as image:
        sprite = image.convert('RGB')

    def tile(i: int) -> Image.Image:
        x, y = size * (i % columns), size * (i // columns)
        return sprite.crop((x, y, x + size, y + size))

    examples = tuple(Example(tile(e['tile']), e['true_class'], e['lesson'], e['index']) for e in values['examples'])
    gallery = tuple(GalleryImage(g['tile'], g['true_class'], tuple(g['predictions']), tuple(g['confidences']))
                    for g in values['gallery'])
    encoded = base64.b64encode((folder / SPRITE_FILE).read_bytes()).decode()
    return Assets(examples, gallery, tuple(values['reliability']), f'data:image/png;base64,{encoded}', columns)


def _samples(labels: Sequence[str]) -> Tuple[Example, ...]:
    examples = []
    for path in sorted(SAMPLES.glob('*.png')):
        true_class = path.stem.split('_', 3)[3]  # dataset_split_index_class
        if true_class in labels:
            with Image.open(path) as image:
                examples.append(Example(image.convert('RGB'), true_class, '', int(path.stem.split('_')[2])))
    return tuple(examples)


@dataclass(frozen=True)
class CurvePoint:
    """Results at one average budget: MACs per image, accuracy in percent, share of images leaving at each exit."""

    macs: float
    accuracy: float
    shares: Tuple[float, ...]


@dataclass(frozen=True)
class Curve:
    """Accuracy against average cost.

    Attributes:
        images: What it was measured on, in words.
        budgets: Average budgets in MACs, rising.
        points: One per budget.
        exits: (MACs, accuracy) of each exit alone, or empty.
    """

    images: str
    budgets: Tuple[float, ...]
    points: Tuple[CurvePoint, ...]
    exits: Tuple[Tuple[float, float], ...] = ()

    def at(self, budget: float) -> CurvePoint:
        """The point at a budget, interpolated between the stored ones."""
        columns = zip(*((p.macs, p.accuracy, *p.shares) for p in self.points))
        macs, accuracy, *shares = (float(np.interp(budget, self.budgets, column)) for column in columns)
        return CurvePoint(macs, accuracy, tuple(shares))


def load_curve(name: str, config: ExitConfig) -> Optional[Curve]:
    """The curve on test images from results.json beside the weights, else on validation images from the policies.

    None if no policies are stored, or policies without their validation results.
    """
    policies = config.policies
    if not policies:
        return None
    path = WEIGHTS_DIR / name / RESULTS_NAME
    if ':' not in name and path.is_file():
        return _test_curve(Results.load(path), policies[0].method)
    if any(p.expected_macs is None or p.expected_accuracy is None or p.exit_shares is None for p in policies):
        return None
    points = tuple(CurvePoint(p.expected_macs, p.expected_accuracy, p.exit_shares) for p in policies)
    return Curve('the validation images', tuple(p.budget for p in policies), points)


def _test_curve(results: Results, method: str) -> Curve:
    rows = results.budgeted.get(method) or next(iter(results.budgeted.values()))
    points = tuple(CurvePoint(r.average_macs, r.accuracy, r.exit_shares) for r in rows)
    return Curve(
        f'{results.test_images:,} test images', tuple(r.budget for r in rows), points,
        tuple((e.macs, e.accuracy) for e in results.exits))


def parse_position(text: Optional[str], count: int) -> int:
    """Position of an example from a link, which counts from 1; the first if there is no such example.

    >>> parse_position('3', 8), parse_position('x', 8), parse_position(None, 8)
    (2, 0, 0)
    """
    try:
        position = int(text or 1) - 1
    except ValueError:
        return 0
    return position if 0 <= position < count else 0


def require_examples(assets: Assets, name: str) -> None:
    """Checks that there is an image to show.

    Raises:
        InputError: there is none.
    """
    if not assets.examples:
        raise InputError(
            f"there are no example images for '{name}': create them with python app/tools/choose_examples.py")
