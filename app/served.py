"""Networks with trained weights, each loaded once for all visitors; the only module of the app that runs a model."""
import statistics
import threading
import time
from typing import Dict, List, Optional, Tuple

import torch
from answers import ExitOutputs
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from timm_multiexit import ExitConfig, InputError, exit_costs, list_networks, load_model
from timm_multiexit.datasets import DATASETS, normalize
from timm_multiexit.errors import MissingFileError
from timm_multiexit.inference.images import Source
from timm_multiexit.inference.preprocess import Preprocessing
from timm_multiexit.pretrained.exit_config import exit_config_of
from timm_multiexit.pretrained.names import class_labels, require_weights

TIMED_RUNS = 9
_loaded: Dict[str, 'Network'] = {}
_served: List[str] = []
_loading = threading.Lock()


class Network:
    """A network with what is stored beside its weights.

    Args:
        name: 'arch.tag' in the registry, or timm's 'hf-hub:ORG/NAME' or 'local-dir:PATH'.

    Attributes:
        config: The stored exit config, or None.
        milliseconds: Median cumulative time to each exit at batch size 1 on this machine.

    Raises:
        InputError: unknown name, no weights, or an exit config of another network.
    """

    def __init__(self, name: str):
        require_weights(name)
        self.name, self.model = name, load_model(name)
        try:
            self.config: Optional[ExitConfig] = exit_config_of(self.model, name)
        except MissingFileError:
            self.config = None
        if self.config is not None:
            self.costs = self.config.costs
            self.temperatures = self.config.temperatures
        else:
            self.costs = exit_costs(self.model)
            self.temperatures = (1.,) * self.model.num_exits
        self.labels = class_labels(self.model, self.config.class_names if self.config else None)
        self.preprocess = Preprocessing.of(self.model)
        self.milliseconds = self._measure()

    def _measure(self) -> Tuple[float, ...]:
        x = torch.zeros(1, *self.costs.input_size)
        runs = [self._timed_exits(x)[1] for _ in range(TIMED_RUNS + 2)][2:]  # the first two warm up
        times = [statistics.median(column) for column in zip(*runs)]
        return tuple(max(times[:k + 1]) for k in range(len(times)))  # on a busy machine medians may not rise

    @torch.inference_mode()
    def _timed_exits(self, x: torch.Tensor) -> Tuple[List[torch.Tensor], List[float]]:
        start = time.perf_counter()
        logits, times = [], []
        for out in self.model.iter_exits(x):
            logits.append(out)
            times.append(1e3 * (time.perf_counter() - start))
        return logits, times

    def run(
            self,
            image: Source,
            true_class: Optional[str] = None,
            example: Optional[int] = None,
    ) -> ExitOutputs:
        """Runs all exits once on one image, a file or an example."""
        image, notes = self.preprocess.open(image)
        height, width = self.preprocess.input_size[1:]
        # An example of the network's size is what it saw already; resized and cropped again it would be another.
        seen = example is not None and image.size == (width, height)
        pixels = pil_to_tensor(image) if seen else self.preprocess.pixels(image)
        x = normalize(pixels[None], self.preprocess.mean, self.preprocess.std)[0]
        logits = torch.stack([out[0] for out in self._timed_exits(x.unsqueeze(0))[0]]).float().clone()
        return ExitOutputs(
            self.name, logits, self.labels, self.costs, self.milliseconds, tuple(self.temperatures),
            to_pil_image(pixels), true_class, tuple(notes), example)


def get_network(name: str) -> Network:
    """The network of that name, loaded at the first call and then kept.

    Raises:
        InputError: as `Network`, or not one of `available_networks`.
    """
    if not isinstance(name, str):
        raise InputError('no network given: choose one of ' + ', '.join(_served))
    if name not in _loaded:  # those that are loaded do not wait for one that is not
        if name not in (_served or available_networks()):  # a caller's names may point anywhere
            raise InputError(f"the network '{name[:100]}' is not served here: choose one of {', '.join(_served)}")
        with _loading:  # two visitors at once must not load it twice
            if name not in _loaded:
                _loaded[name] = Network(name)
    return _loaded[name]


def available_networks(extra: str = '') -> List[str]:
    """Names of the networks that are served from now on: those with trained weights, `extra` first (see --model).

    Raises:
        InputError: no weights at all, or none for `extra`.
    """
    names = list_networks(pretrained=True)
    if extra:
        require_weights(extra)
        first = extra if ':' in extra else next(n for n in names if extra in (n, n.partition('.')[0]))
        names = [first, *(n for n in names if n != first)]
    if not names:
        raise InputError('no trained weights are installed: pass --model hf-hub:ORG/NAME')
    _served[:] = names
    return names


def served_names() -> List[str]:
    """Names of the networks that are served."""
    return list(_served)


def display_name(name: str) -> str:
    """'CIFAR-10 · msfuse_cifar' for 'msfuse_cifar.cifar10'."""
    arch, dot, tag = name.partition('.')
    if not dot or ':' in name:
        return name
    return f'{DATASETS[tag].title if tag in DATASETS else tag} · {arch}'
