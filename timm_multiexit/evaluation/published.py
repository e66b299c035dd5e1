"""Published curves of early-exit networks on CIFAR, to draw beside one's own."""
from dataclasses import dataclass
from typing import Dict, Tuple


@dataclass(frozen=True)
class PublishedCurve:
    """Test accuracy against cost, as published.

    Attributes:
        work: Name of the network, and where the figures are from.
        mode: 'anytime', the cost and accuracy of each exit, or 'budgeted', the average cost of an image.
        points: (MACs in millions, top-1 accuracy in percent), rising in MACs; read off a figure to about 0.1 point.
    """

    work: str
    mode: str
    points: Tuple[Tuple[float, float], ...]


def _curve(work: str, mode: str, text: str) -> PublishedCurve:
    points = (point.split(':') for point in text.split())
    return PublishedCurve(work, mode, tuple((float(macs), float(accuracy)) for macs, accuracy in points))


# L2W-DEN: Han et al., ECCV 2022. BoostNet: Yu et al., AAAI 2023. RANet, with its MSDNet: Yang et al., CVPR 2020. The
# thresholds of L2W-DEN are set on images that it was trained on.
PUBLISHED: Dict[str, Tuple[PublishedCurve, ...]] = {
    'torch/cifar10': (
        _curve('MSDNet (Yang et al.)', 'anytime', '15:89.5 25.5:90.9 37.8:91.5 52:92.6 62:93.0 74:93.25 88:93.6'),
        _curve('RANet (Yang et al.)', 'anytime',
               '15.7:91.3 31.2:92.0 44.5:93.1 50.2:93.15 60.3:93.15 63.3:93.35 89.5:93.6 94.3:93.7'),
        _curve('RANet (Yang et al.)', 'budgeted', '12:91.3 15:92.0 20:92.85 25:93.34 30:93.57 40:94.02 50:94.17'),
        _curve('L2W-DEN on MSDNet', 'budgeted',
               '10:92.3 12:92.9 14:93.35 16:93.7 18:94.07 20:94.36 25:94.67 30:94.75'),
    ),
    'torch/cifar100': (
        _curve('MSDNet (Yang et al.)', 'anytime', '15:61.4 25.5:64.6 37.8:67.5 52:69.5 62:70.8 74:72.15 88:72.7'),
        _curve('RANet (Yang et al.)', 'anytime',
               '15.7:66.3 31.2:69.4 44.5:71.7 50.2:71.7 60.3:72.3 63.3:72.45 89.5:73.8 94.3:74.4'),
        _curve('BoostNet on MSDNet', 'anytime', '15:65.3 25:70.0 38:72.3 52:74.15 62:75.2 74:75.85 100:76.5'),
        _curve('BoostNet on RANet', 'anytime', '15.8:67.5 31.3:70.8 44.7:73.2 63.7:74.05 95:75.08'),
        _curve('RANet (Yang et al.)', 'budgeted', '12:66.7 15:69.2 20:71.0 25:71.8 30:73.2 40:74.2 50:74.95 60:75.5'),
        _curve('L2W-DEN on MSDNet', 'budgeted',
               '10:66.5 15:70.4 20:72.4 25:73.4 30:74.0 35:74.3 50:75.1 60:75.7 70:76.0'),
        _curve('BoostNet on MSDNet', 'budgeted', '20:70.3 25:73.2 30:74.3 40:75.2 45:75.55 60:75.7 80:75.8'),
    ),
}
