"""Folders of generated photos that a small network can tell apart: each class has its own stripes and colour."""
from pathlib import Path
from typing import Callable, Dict, Sequence, Tuple

import numpy as np
from PIL import Image

# Names as people have them: blanks, letters beyond ASCII, another alphabet.
TWELVE = ('Äpfel', 'pêches mûres', 'red bag', 'żaba', 'смородина', '猫', 'chair', 'dog 2', 'dog 10', 'éclair au café',
          'ship & sail', 'tree')


def picture(kind: int, kinds: int, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """One photo of a class, float (H, W, 3) in 0-1."""
    angle, phase = np.pi * kind / kinds, rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:height, :width] / min(height, width)
    stripes = np.sin(2 * np.pi * 4 * (x * np.cos(angle) + y * np.sin(angle)) + phase)[..., None]
    hue = 2 * np.pi * kind / kinds + np.array([0., 2.1, 4.2])
    colour = 0.5 + 0.3 * np.cos(hue + rng.normal(0., 0.2, 3))
    return (colour + 0.2 * stripes + rng.normal(0., 0.1, (height, width, 3))).clip(0., 1.)


def save_rgb(path: Path, values: np.ndarray) -> None:
    Image.fromarray((255 * values).round().astype(np.uint8)).save(path)


def save_12_bits(path: Path, values: np.ndarray) -> None:
    """Grey scans whose 12 bits lie in 16."""
    Image.fromarray((4095 * values.mean(2)).round().astype(np.uint16)).save(path)


def make_photos(
        root: Path,
        classes: Sequence[str],
        counts: Dict[str, int],
        sizes: Tuple[int, int] = (64, 64),
        save: Callable[[Path, np.ndarray], None] = save_rgb,
        suffix: str = '.png',
        seed: int = 0,
) -> Path:
    """Writes ROOT/SPLIT/CLASS/N.png, images per class by split ('' for class folders without splits); returns ROOT.

    Sides are drawn between the two `sizes`.
    """
    rng = np.random.default_rng(seed)
    for split, count in counts.items():
        for kind, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                height, width = rng.integers(sizes[0], sizes[1] + 1, 2)
                save(folder / f'{split}{i:03d}{suffix}', picture(kind, len(classes), height, width, rng))
    return root
