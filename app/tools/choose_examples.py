"""Chooses the images that the app shows, from a trained network's predictions.

    python app/tools/choose_examples.py --data-dir DATA                                # the package's networks
    python app/tools/choose_examples.py local-dir:output/mine/final --data-dir PHOTOS  # your own, once calibrated

Writes `examples.json` and `images.png`: test images into `assets/ARCH.TAG/`, and for a network of your own images that
its run held out for choices, beside its weights, from where no push sends them without `--with-images`. The app itself
needs no data set.
"""
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import torch
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from timm_multiexit import ExitConfig, list_networks, load_model
from timm_multiexit.commands import Parser
from timm_multiexit.data.images import Images
from timm_multiexit.data.splits import open_splits
from timm_multiexit.errors import run_command
from timm_multiexit.evaluation.evaluate import LabelledLogits, calibration_error, exit_logits
from timm_multiexit.files import write_json, written_beside
from timm_multiexit.inference.preprocess import Preprocessing
from timm_multiexit.pretrained.exit_config import exit_config_of, list_stored
from timm_multiexit.pretrained.hub_files import EXAMPLES_FILE, SPRITE_FILE
from timm_multiexit.pretrained.names import class_labels, with_default_tag
from timm_multiexit.pretrained.record import trained_on, training_data
from timm_multiexit.stopping.policy import confidence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples import assets_folder  # noqa: E402

PER_LESSON = 2
GALLERY = 64  # images
COLUMNS = 16  # images in a row of the sprite
BINS = 10


def lessons(probabilities: torch.Tensor, targets: torch.Tensor) -> Dict[str, torch.Tensor]:
    """How well each image illustrates each lesson.

    Args:
        probabilities: Calibrated, float32 (num_exits, N, num_classes).
        targets: int64 (N,).

    Returns:
        For each lesson a score (N,), higher is better, -inf for images that do not show it.
    """
    confidences, predictions = probabilities.max(2)
    correct = predictions == targets
    first, last = confidences[0], confidences[-1]
    changes = (predictions[1:] != predictions[:-1]).sum(0)
    wrong_until = (~correct).int().cumprod(0).sum(0)  # exits before the first correct one
    late = (wrong_until >= len(correct) / 2) & (wrong_until + correct.sum(0) == len(correct)) & correct[-1]
    shown = {
        'Correct from the start': (correct.all(0), confidences.amin(0)),
        'Correct only late': (late, last + 0.5 * first),
        'Changes its mind': ((changes >= 2) & ~late & (correct[0] | ~correct[-1]), changes + last + first),
        'Never correct': (~correct.any(0), last - 0.2 * changes),
    }
    return {lesson: score.masked_fill(~images, float('-inf')) for lesson, (images, score) in shown.items()}


def choose(scores: Dict[str, torch.Tensor], targets: torch.Tensor) -> List[Dict[str, Any]]:
    """The best images of each lesson, of different classes where possible; a lesson without images is left out."""
    chosen, used = [], set()
    for lesson, score in scores.items():
        order = [i for i in score.argsort(descending=True, stable=True).tolist() if score[i] > float('-inf')]
        fresh = [i for i in order if int(targets[i]) not in used]
        picks = []
        for i in fresh + order:
            if len(picks) < PER_LESSON and i not in picks and (i not in fresh or int(targets[i]) not in used):
                picks.append(i)
                used.add(int(targets[i]))
        chosen += [dict(index=i, lesson=lesson) for i in picks]
    return chosen


def choose_gallery(confidences: torch.Tensor) -> List[int]:
    """Images sampled evenly by mean confidence, so that they leave at the exits in the dataset's proportions.

    Args:
        confidences: Confidences of each exit, float32 (num_exits, N).
    """
    order = confidences.mean(0).argsort(descending=True, stable=True)
    count = min(GALLERY, len(order))
    return [int(order[(2 * i + 1) * len(order) // (2 * count)]) for i in range(count)]


def reliability(logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> Dict[str, Any]:
    """Calibration error of one exit in percent, and its accuracy in bins of equal confidence; empty ones are left out.

    Args:
        logits: (N, num_classes).
        targets: int64 (N,).
        temperature: Temperature of the exit.
    """
    confidences, predictions = (logits / temperature).softmax(1).max(1)
    position = (confidences * BINS).long().clamp(max=BINS - 1)
    bins = []
    for b in position.unique().tolist():
        inside = position == b
        bins.append({
            'from': b / BINS, 'to': (b + 1) / BINS, 'confidence': round(float(confidences[inside].mean()), 4),
            'accuracy': round(float((predictions == targets)[inside].float().mean()), 4),
            'share': round(float(inside.float().mean()), 4)})
    return dict(calibration_error=round(calibration_error(logits, targets, temperature), 3), bins=bins)


def make_assets(
        name: str,
        labels: Sequence[str],
        config: ExitConfig,
        images: torch.Tensor,
        outputs: LabelledLogits,
        split: str = 'test',
) -> None:
    """Writes the images and reliability of one network for the app.

    Args:
        name: 'arch.tag'.
        labels: Class names.
        config: The stored exit config.
        images: uint8 (N, C, H, W).
        outputs: Their logits and targets.
        split: What they are called, 'test' or 'validation'.
    """
    by_exit = list(zip(outputs.logits, config.temperatures))
    examples = choose(lessons(torch.stack([(x / t).softmax(1) for x, t in by_exit]), outputs.targets), outputs.targets)
    confidences = torch.stack([confidence(x, config.measure, t) for x, t in by_exit])
    picks = choose_gallery(confidences)
    predictions = outputs.logits.argmax(2)
    for tile, example in enumerate(examples):
        example.update(tile=tile, true_class=labels[outputs.targets[example['index']]])
    gallery = [
        dict(
            tile=len(examples) + i, index=index, true_class=labels[outputs.targets[index]],
            predictions=[labels[c] for c in predictions[:, index].tolist()],
            confidences=[round(c, 5) for c in confidences[:, index].tolist()])
        for i, index in enumerate(picks)]
    tiles = images[[e['index'] for e in examples] + picks]
    folder = assets_folder(name)
    with written_beside(folder / SPRITE_FILE) as partial:
        to_pil_image(make_grid(tiles, COLUMNS, padding=0)).save(partial, optimize=True)
    bins = [{name: reliability(x, outputs.targets, value) for name, value in (('raw', 1.), ('calibrated', t))}
            for x, t in by_exit]
    write_json(folder / EXAMPLES_FILE, dict(
        split=split, size=tuple(images.shape[:1:-1]), columns=COLUMNS, examples=examples, gallery=gallery,
        reliability=bins))


def run(argv: Sequence[str]) -> None:
    """Chooses the examples of the networks that the arguments name."""
    parser = Parser(prog='choose_examples.py', description=__doc__.splitlines()[0])
    parser.add_argument('models', nargs='*', metavar='MODEL',
                        help='arch.tag, or local-dir:FOLDER for your own, whose images lie beside the weights '
                             '(default: all with weights and an exit config)')
    parser.add_argument('--data-dir', required=True, metavar='DIR', help='folder of the dataset')
    args = parser.parse_args(argv)
    names = [name if ':' in name else with_default_tag(name) for name in args.models]
    for name in names or sorted(set(list_networks(pretrained=True)) & set(list_stored())):
        model = load_model(name)
        config = exit_config_of(model, name)
        labels = class_labels(model, config.class_names)
        splits = open_splits(trained_on(model), args.data_dir, labels, held_out=training_data(model).held_out)
        packaged = ':' not in name
        data = Images(splits['test' if packaged else 'development'], Preprocessing.of(model), label=name)
        make_assets(name, labels, config, data.stack()[0], exit_logits(model, data),
                    'test' if packaged else 'validation')
        print(f'{assets_folder(name)}: {EXAMPLES_FILE}, {SPRITE_FILE}')


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs the command; returns the status of `run_command`."""
    return run_command('choose_examples.py', run, argv)


if __name__ == '__main__':
    sys.exit(main())
