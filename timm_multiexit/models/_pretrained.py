"""Pretrained cfgs of the CIFAR networks: statistics of the data sets and where the weights lie."""
from pathlib import Path
from typing import Any, Dict

# Weights travel with the package: `NAME.TAG/model.safetensors` in this folder, beside its results and policies.
WEIGHTS_DIR = Path(__file__).resolve().parent.parent / 'weights'
CIFAR10_CLASSES = """
    airplane automobile bird cat deer dog frog horse ship truck
""".split()
CIFAR100_CLASSES = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
    castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
    elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard
    lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear
    pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark
    shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone
    television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
""".split()
# Mean and deviation of the training images' channels, and the classes in the order of the targets.
DATASETS = {
    'cifar10': dict(
        num_classes=10, label_names=tuple(CIFAR10_CLASSES), mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616)),
    'cifar100': dict(
        num_classes=100, label_names=tuple(CIFAR100_CLASSES), mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762)),
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
