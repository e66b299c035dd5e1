"""Time on this machine, of each exit and of policies against the full network."""
import statistics
from typing import Any, Dict, List, Sequence

import torch

from ..inference.profile import noise, take_turns
from ..inference.runner import EarlyExitRunner
from ..stopping.costs import ExitCosts
from ..stopping.policy import ExitPolicy


def spread(values: Sequence[float], digits: int = 4) -> Dict[str, float]:
    """Median, minimum and maximum."""
    return dict(
        median=round(statistics.median(values), digits), min=round(min(values), digits),
        max=round(max(values), digits))


def measure_exits(engine, costs: ExitCosts, batch_size: int, rounds: int, passes: int = 20) -> List[Dict[str, Any]]:
    """Time to the answer of each exit when no earlier head runs, on random images.

    Args:
        engine: See `engine.make_engine`.
        costs: Costs of the exits.
        batch_size: The large batch.
        rounds: How many.
        passes: Forward passes per round at batch 1.
    """
    last_exits = [ExitPolicy.at_exit(k, engine.num_exits) for k in range(engine.num_exits)]
    runners = [EarlyExitRunner(engine, policy, costs=costs) for policy in last_exits]
    batch = noise(engine, costs.input_size, batch_size)
    one = batch[:1]
    singles = take_turns(
        {k: lambda r=r: [r.run(one) for _ in range(passes)] for k, r in enumerate(runners)}, rounds, engine.device,
        'exits, batch 1')
    batches = take_turns(
        {k: lambda r=r: r.run(batch, batch_size) for k, r in enumerate(runners)}, rounds, engine.device,
        f'exits, batch {batch_size}')
    return [
        dict(exit=k + 1, macs=costs.macs[k], ms_batch_1=spread([1e3 * t / passes for t in singles[k]]),
             images_per_s=spread([batch_size / t for t in batches[k]], 1))
        for k in range(engine.num_exits)
    ]


def measure_policies(
        engine,
        costs: ExitCosts,
        policies: Dict[str, ExitPolicy],
        images: torch.Tensor,
        targets: torch.Tensor,
        batch_size: int,
        rounds: int,
) -> Dict[str, Any]:
    """Wall time of the same images under each policy and through the full network.

    Args:
        engine: See `engine.make_engine`; shared by all.
        costs: Costs of the exits.
        policies: By name.
        images: Normalised, (N, C, H, W).
        targets: int64 (N,).
        batch_size: The large batch.
        rounds: How many.

    Returns:
        Times of the full network and of each policy, and their ratios, round by round.
    """
    last = engine.num_exits - 1
    every = {'full': ExitPolicy.at_exit(last, engine.num_exits), **policies}
    runners = [EarlyExitRunner(engine, p, costs=costs) for p in every.values()]
    images = images.to(engine.device)
    singles = images.split(1)
    times = {
        1: take_turns({i: lambda r=r: [r.run(x) for x in singles] for i, r in enumerate(runners)}, rounds,
                      engine.device, 'policies, batch 1'),
        batch_size: take_turns({i: lambda r=r: r.run(images, batch_size) for i, r in enumerate(runners)}, rounds,
                               engine.device, f'policies, batch {batch_size}'),
    }
    rows = []
    for i, (name, runner) in enumerate(zip(every, runners)):
        result = runner.run(images, batch_size)
        row = dict(
            name=name, average_macs=round(result.average_macs),
            accuracy=round(result.accuracy(targets), 2),
            exit_shares=[round(s, 4) for s in result.exit_shares(engine.num_exits)],
            heads=[k + 1 for _, k in runner.segments])
        for size, key in ((1, 'batch_1'), (batch_size, f'batch_{batch_size}')):
            own, whole = times[size][i], times[size][0]
            row[key] = dict(
                ms_per_image=spread([1e3 * t / len(images) for t in own]),
                images_per_s=spread([len(images) / t for t in own], 1),
                share_of_full_time=spread([a / b for a, b in zip(own, whole)], 3))
        rows.append(row)
    return dict(images=len(images), full=rows[0], policies=rows[1:])
