"""What each stage and each head takes on this machine, measured once and kept in the user's cache folder.

The time of a head is what evaluating it adds to a run of the whole network: the head, a stop between two stages, and
the decision. These times do not quite add up to that of a policy, so `traffic` measures the policy itself.
"""
import hashlib
import importlib.metadata
import json
import os
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Tuple, Union

import numpy as np
import torch
from tqdm import tqdm

from ..files import read_json, write_json
from ..models import MultiExitNet
from ..pretrained.exit_config import weights_digest
from ..stopping.costs import ExitCosts, StageCosts
from ..stopping.policy import ALWAYS, NEVER, ExitPolicy, StoppingRule
from .device import processor
from .engine import Engine, make_engine
from .runner import EarlyExitRunner
from .traffic import share_of_full_time

_SECONDS = 6.  # to spend in all
_ROUNDS = 30
_MIN_ROUNDS = 5


def take_turns(tasks: Dict[Any, Callable[[], Any]], rounds: int, device: torch.device, label: str) -> Dict[Any, list]:
    """Seconds of each task in each round. All tasks run once per round, starting with another one each time.

    Args:
        tasks: Each runs once unmeasured first.
        rounds: How many.
        device: Synchronised if it is a GPU.
        label: Text of the progress bar.
    """
    names = list(tasks)
    times = {name: [] for name in names}
    with tqdm(total=(rounds + 1) * len(names), desc=label, leave=False, disable=None) as progress:
        for number in range(-1, rounds):
            shift = max(number, 0) % len(names)
            for name in names[shift:] + names[:shift]:
                start = time.perf_counter()
                tasks[name]()
                if device.type == 'cuda':
                    torch.cuda.synchronize(device)
                if number >= 0:
                    times[name].append(time.perf_counter() - start)
                progress.update()
    return times


def device_name(device: torch.device) -> str:
    """The GPU or the processor by name."""
    return torch.cuda.get_device_name(device) if device.type == 'cuda' else processor()


def measure_profile(engine: Engine, input_size: Tuple[int, int, int], batch_size: int = 1) -> StageCosts:
    """Milliseconds per image of each stage and head, medians, on random images of which none leaves.

    Args:
        engine: See `engine.make_engine`.
        input_size: (C, H, W) of the images.
        batch_size: Images per batch; all workers of the engine share them.
    """
    count, last = engine.num_exits, engine.num_exits - 1
    policies = {('to', k): ExitPolicy.at_exit(k, count) for k in range(count)}
    for k in range(last):  # the whole network, with the head of exit k evaluated on the way
        never_reached = (*(NEVER / 2 if j == k else NEVER for j in range(last)), ALWAYS)
        policies['past', k] = ExitPolicy(never_reached, (1.,) * count)
    runners = {name: EarlyExitRunner(engine, policy, costs=_no_costs(count)) for name, policy in policies.items()}
    images = noise(engine, input_size, batch_size)
    once = min(_timed(runners['to', last], images) for _ in range(3))
    rounds = int(min(max(_SECONDS / (once * len(runners)), _MIN_ROUNDS), _ROUNDS))
    passes = max(1, int(_SECONDS / (once * len(runners) * rounds)))
    tasks = {name: lambda r=r: [r.run(images, batch_size) for _ in range(passes)] for name, r in runners.items()}
    times = take_turns(tasks, rounds, engine.device, 'profile')
    ms = {name: 1e3 * statistics.median(t) / passes / batch_size for name, t in times.items()}
    heads = [max(ms['past', k] - ms['to', last], 0.) for k in range(last)] + [0.]
    reached = np.maximum.accumulate([max(ms['to', k] - heads[k], 0.) for k in range(count)])  # noise: rising at least
    times = StageCosts(tuple(np.diff(reached, prepend=0.).tolist()), tuple(heads))
    return replace(times, measure=_measure_policies(engine, images, times.full))


def _measure_policies(engine: Engine, images: torch.Tensor, full_ms: float) -> Callable[[ExitPolicy], float]:
    """A function that measures a policy on a batch of images, against the full network, in milliseconds per image."""
    def prepare(rule: StoppingRule) -> Callable[[], Any]:
        runner = EarlyExitRunner(engine, rule, costs=_no_costs(engine.num_exits))
        return lambda: runner.run(images, len(images))

    return lambda policy: full_ms * share_of_full_time(prepare, policy)


def _no_costs(num_exits: int) -> ExitCosts:
    """Placeholders, which no one reads."""
    numbers = tuple(range(1, num_exits + 1))
    return ExitCosts(numbers, numbers, (1, 1, 1))


def noise(engine: Engine, input_size: Tuple[int, int, int], batch_size: int) -> torch.Tensor:
    """Random images (B, C, H, W) on the engine's device, the same in every call."""
    return torch.randn(batch_size, *input_size, generator=torch.Generator().manual_seed(0)).to(engine.device)


def _timed(runner: EarlyExitRunner, images: torch.Tensor) -> float:
    start = time.perf_counter()
    runner.run(images, len(images))
    return time.perf_counter() - start


def profile(
        model: MultiExitNet,
        engine: Union[str, Engine] = 'auto',
        batch_size: int = 1,
        input_size: Optional[Tuple[int, int, int]] = None,
        again: bool = False,
) -> StageCosts:
    """What each stage and head takes on this machine: from the cache folder, or measured now and kept there.

    Args:
        model: The network.
        engine: See `engine.make_engine`, or an engine that runs this network.
        batch_size: Images per batch.
        input_size: (C, H, W) of the images; None for that in the network's pretrained cfg.
        again: Measure even if a profile is kept.

    Returns:
        Milliseconds per image, for `ExitConfig.policy_for(average_ms=..., profile=...)`, which also measures the
        policies that it tries, and keeps their times.

    Raises:
        InputError: an engine that is not available, or the cache folder cannot be written to.
    """
    engine = make_engine(model, engine) if isinstance(engine, str) else engine
    input_size = input_size or (model.in_chans, *model.pretrained_cfg['input_size'][1:])
    path, conditions = kept_profile(model, engine, batch_size, input_size)
    kept: Any = read_json(path, 'profile') if path.is_file() and not again else None
    if not isinstance(kept, dict) or kept.get('conditions') != conditions or 'policies_ms' not in kept:
        costs = measure_profile(engine, input_size, batch_size)
        kept = dict(conditions=conditions, stages_ms=list(costs.stages), heads_ms=list(costs.heads), policies_ms={})
        write_json(path, kept)
    costs = StageCosts(tuple(kept['stages_ms']), tuple(kept['heads_ms']))
    measure = _measure_policies(engine, noise(engine, input_size, batch_size), costs.full)

    def measure_once(policy: ExitPolicy) -> float:
        key = json.dumps([policy.exits_in_use, policy.exit_shares])
        if key not in kept['policies_ms']:
            kept['policies_ms'][key] = measure(policy)
            write_json(path, kept)
        return kept['policies_ms'][key]

    return replace(costs, measure=measure_once)


def kept_profile(
        model: MultiExitNet,
        engine: Engine,
        batch_size: int,
        input_size: Tuple[int, int, int],
) -> Tuple[Path, Dict[str, Any]]:
    """The file that keeps a profile, and all that it depends on."""
    packages = ['torch'] + ['onnxruntime'] * (engine.name == 'onnx')
    conditions = dict(
        weights=weights_digest(model), input_size=list(input_size), batch_size=batch_size, engine=engine.name,
        precision=str(engine.dtype), device=device_name(engine.device),
        threads=torch.get_num_threads(), workers=engine.workers,
        versions={name: importlib.metadata.version(name) for name in packages})
    key = hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / 'profiles' / f'{key}.json', conditions


def cache_folder() -> Path:
    """Where profiles are kept: `timm-multiexit` in XDG_CACHE_HOME, else in ~/.cache."""
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'timm-multiexit'
