"""Pretrained cfgs: one per network and data set, with the statistics of the data set and the path of the weights."""
import itertools
from pathlib import Path
from typing import Any, Dict

from ..datasets import DATASETS

# Weights ship with the package: `ARCH.TAG/model.safetensors` in this folder, with their results and exit config.
WEIGHTS_DIR = Path(__file__).resolve().parent.parent / 'weights'


def imagenet_cfgs(exits: Dict[str, int], **kwargs: Any) -> Dict[str, Dict[str, Any]]:
    """A cfg for each network for ImageNet, without weights; arguments as for `pretrained_cfgs`."""
    return {arch: dict(
        input_size=(3, 224, 224), min_input_size=(3, 112, 112), pool_size=(2, 2), interpolation='bilinear',
        crop_pct=0.875, classifier=tuple(f'exits.{k}.fc' for k in range(num_exits)), num_classes=1000,
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), first_conv='stages.0.layers.0.convs.0.0.conv', **kwargs)
        for arch, num_exits in exits.items()}


def pretrained_cfgs(exits: Dict[str, int], **kwargs: Any) -> Dict[str, Dict[str, Any]]:
    """A cfg `ARCH.TAG` for each network and data set of `DATASETS`, for timm's `generate_default_cfgs`.

    The first data set is the default, also where only another one's weights are in the package. It comes last, since
    timm puts a cfg with weights in front of those before it if none of them has any, the one with a `*` too.

    `file` is set only where the weights are in the package: timm then lists only names that load, and says that the
    others have no pretrained weights.

    Args:
        exits: Number of exits of each network, by its name in timm's registry.
        **kwargs: Further entries, the same in every cfg.
    """
    cfgs = {}
    for (arch, num_exits), (tag, dataset) in itertools.product(exits.items(), reversed(DATASETS.items())):
        weights = WEIGHTS_DIR / f'{arch}.{tag}' / 'model.safetensors'
        default = '*' if tag == next(iter(DATASETS)) else ''
        cfgs[f'{arch}.{tag}{default}'] = dict(
            file=str(weights) if weights.is_file() else None,
            input_size=dataset.input_size,
            min_input_size=(3, 32, 32),
            interpolation='bilinear',
            crop_pct=1.0,
            classifier=tuple(f'exits.{k}.fc' for k in range(num_exits)),
            license='apache-2.0',
            num_classes=len(dataset.classes),
            label_names=dataset.classes,
            mean=dataset.mean,
            std=dataset.std,
            **kwargs)
    return cfgs
