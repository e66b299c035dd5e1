"""Pretrained cfgs of the CIFAR networks: statistics of the data sets and where the weights lie."""
from pathlib import Path
from typing import Any, Dict

# Weights travel with the package: `NAME.TAG/model.safetensors` in this folder, beside its results and policies.
WEIGHTS_DIR = Path(__file__).resolve().parent.parent / 'weights'

# Mean and standard deviation of the training images' channels (section 4 of the RANet paper's code and later work).
DATASETS = {
    'cifar10': dict(num_classes=10, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)),
    'cifar100': dict(num_classes=100, mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762)),
}


def cifar_cfg(name: str, num_exits: int, **kwargs: Any) -> Dict[str, Any]:
    """The pretrained cfg of `ARCH.TAG`, where the tag names the data set.

    A weight source is set only if the weights are in the package, so that timm says "no pretrained weights" for the
    others and lists only those that load.
    """
    tag = name.split('.', 1)[1]
    weights = WEIGHTS_DIR / name / 'model.safetensors'
    return dict(
        file=str(weights) if weights.is_file() else None,
        input_size=(3, 32, 32),
        min_input_size=(3, 32, 32),
        interpolation='bilinear',
        crop_pct=1.0,
        classifier=tuple(f'exits.{k}.fc' for k in range(num_exits)),
        license='apache-2.0',
        **DATASETS[tag],
        **kwargs)
