"""Chooses the test images that the app shows, from a trained network's predictions, and stores them in assets/.

    python app/tools/choose_examples.py --data-dir D [MODEL ...]

For every network with weights and stored policies (or those named): `assets/ARCH.TAG/examples.json` and `images.png`.
Needs the dataset; the app itself does not.
"""
import argparse
import sys
from pathlib import Path
from typing import Any, Dict, List, Sequence

import torch
from PIL import Image

from timm_multiexit import ExitConfig, InputError, list_networks, load_exit_config, load_model
from timm_multiexit.datasets import load_images, trained_on
from timm_multiexit.evaluation.evaluate import LabelledLogits, calibration_error, exit_logits
from timm_multiexit.files import write_json, written_beside
from timm_multiexit.pretrained.exit_config import list_stored
from timm_multiexit.pretrained.names import class_labels
from timm_multiexit.stopping.policy import confidence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples import ASSETS, EXAMPLES_FILE, SPRITE_FILE  # noqa: E402

PER_LESSON = 2
GALLERY = 64  # images
COLUMNS = 16  # images in a row of the sprite
BINS = 10


def lessons(probabilities: torch.Tensor, targets: torch.Tensor) -> Dict[str, torch.Tensor]:
    """How well each test image illustrates each lesson.

    Args:
        probabilities: Calibrated, float32 (num_exits, N, num_classes).
        targets: int64 (N,).

    Returns:
        For each lesson a score (N,), higher is better, -inf for images that do not show it.
    """
    confidences, predictions = probabilities.max(2)
    correct = predictions == targets
    n = len(predictions)
    changes = (predictions[1:] != predictions[:-1]).sum(0)
    first_correct = torch.where(correct.any(0), correct.int().argmax(0), n)
    stays_correct = correct.flip(0).cumprod(0).flip(0)  # from this exit to the last
    late = torch.zeros_like(correct[0])
    for k in range(-(-n // 2), n):
        late |= (first_correct == k) & stays_correct[k].bool()
    not_shown = torch.full_like(confidences[0], float('-inf'))
    varied = (changes >= 2) & ~late & (correct[0] | ~correct[-1])
    first, last = confidences[0], confidences[-1]
    return {
        'Correct from the start': torch.where(correct.all(0), confidences.amin(0), not_shown),
        'Correct only late': torch.where(late, last + 0.5 * first, not_shown),
        'Changes its mind': torch.where(varied, changes + last + first, not_shown),
        'Never correct': torch.where(~correct.any(0), last - 0.2 * changes, not_shown),
    }


def choose(scores: Dict[str, torch.Tensor], targets: torch.Tensor) -> List[Dict[str, Any]]:
    """The best images of each lesson, of different classes where possible.

    A lesson without images is left out.
    """
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
        confidences: Of each exit, float32 (num_exits, N).
    """
    order = confidences.mean(0).argsort(descending=True, stable=True)
    count = min(GALLERY, len(order))
    return [int(order[(2 * i + 1) * len(order) // (2 * count)]) for i in range(count)]


def reliability_bins(probabilities: torch.Tensor, targets: torch.Tensor) -> List[Dict[str, float]]:
    """Reliability of one exit in bins of equal confidence; empty bins are left out.

    Args:
        probabilities: (N, num_classes).
        targets: int64 (N,).

    Returns:
        For each bin its ends, mean confidence, accuracy, and share of the images.
    """
    confidences, predictions = probabilities.max(1)
    position = (confidences * BINS).long().clamp(max=BINS - 1)
    bins = []
    for b in range(BINS):
        inside = position == b
        if inside.any():
            bins.append({
                'from': b / BINS, 'to': (b + 1) / BINS, 'confidence': round(float(confidences[inside].mean()), 4),
                'accuracy': round(float((predictions == targets)[inside].float().mean()), 4),
                'share': round(float(inside.float().mean()), 4)})
    return bins


def reliability(test: LabelledLogits, temperatures: Sequence[float]) -> List[Dict[str, Any]]:
    """Bins and calibration error in percent of each exit, without and with its temperature."""
    rows = []
    for logits, temperature in zip(test.logits, temperatures):
        row = {}
        for name, t in (('raw', 1.), ('calibrated', temperature)):
            error = calibration_error(logits, test.targets, t)
            row[name] = dict(
                calibration_error=round(error, 3), bins=reliability_bins((logits / t).softmax(1), test.targets))
        rows.append(row)
    return rows


def make_assets(
        name: str,
        labels: Sequence[str],
        config: ExitConfig,
        images: torch.Tensor,
        test: LabelledLogits,
) -> None:
    """Writes the images and reliability of one network for the app.

    Args:
        name: 'arch.tag'.
        labels: Class names.
        config: The stored policies.
        images: Test images uint8 (N, 3, H, W).
        test: Their logits and targets.
    """
    scaled = torch.stack([x / t for x, t in zip(test.logits, config.temperatures)]).softmax(2)
    examples = choose(lessons(scaled, test.targets), test.targets)
    measure = config.policies[0].measure
    confidences = torch.stack([confidence(x, measure, t) for x, t in zip(test.logits, config.temperatures)])
    picks = choose_gallery(confidences)
    predictions = test.logits.argmax(2)
    for tile, example in enumerate(examples):
        example.update(tile=tile, true_class=labels[test.targets[example['index']]])
    gallery = [
        dict(
            tile=len(examples) + i, index=index, true_class=labels[test.targets[index]],
            predictions=[labels[c] for c in predictions[:, index].tolist()],
            confidences=[round(c, 5) for c in confidences[:, index].tolist()])
        for i, index in enumerate(picks)]
    size = images.shape[-1]
    tiles = images[[e['index'] for e in examples] + picks]
    sheet = Image.new('RGB', (size * COLUMNS, size * -(-len(tiles) // COLUMNS)))
    for i, tile in enumerate(tiles):
        sheet.paste(Image.fromarray(tile.permute(1, 2, 0).numpy()), (size * (i % COLUMNS), size * (i // COLUMNS)))
    with written_beside(ASSETS / name / SPRITE_FILE) as partial:
        sheet.save(partial, optimize=True)
    write_json(ASSETS / name / EXAMPLES_FILE, dict(
        network=name, split='test', size=size, columns=COLUMNS, examples=examples, gallery=gallery,
        reliability=reliability(test, config.temperatures)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('models', nargs='*', metavar='MODEL', help='arch.tag (default: all with weights and policies)')
    parser.add_argument('--data-dir', required=True, metavar='DIR', help='folder of the dataset')
    parser.add_argument('--batch-size', type=int, default=250, metavar='N')
    args = parser.parse_args()
    if not Path(args.data_dir).is_dir():
        raise InputError(f"--data-dir '{args.data_dir}' is not a folder: give the folder of the dataset")
    names = args.models or sorted(set(list_networks(pretrained=True)) & set(list_stored()))
    for name in names:
        model, config = load_model(name), load_exit_config(name)
        config.check_network(model)
        labels = class_labels(model, config.class_names)
        images, targets = load_images(trained_on(model.pretrained_cfg).name, args.data_dir, 'test')
        test = LabelledLogits(*exit_logits(model, images, targets, args.batch_size, label=name))
        make_assets(name, labels, config, images, test)
        print(f'{ASSETS / name}: {", ".join(EXAMPLES_FILE.split() + SPRITE_FILE.split())}')


if __name__ == '__main__':
    try:
        main()
    except InputError as error:
        sys.exit(f'choose_examples.py: error: {error}')
