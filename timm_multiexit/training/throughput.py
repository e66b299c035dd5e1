"""Training throughput: what loading, augmentation and EMA cost beside the bare step."""
import statistics
import time

import torch

from .trainer import Trainer

WARMUP_STEPS = 3


def print_throughput(trainer: Trainer, steps: int) -> None:
    """Prints images/s of the bare step on one fixed batch and of the real loop, timed alternately in one run.

    Args:
        trainer: Its network is trained on the way.
        steps: How many of each to time; the medians are printed.
    """
    def endless():
        while True:
            yield from trainer.loader

    batches = endless()
    fixed = trainer.prepare(*next(batches))
    trainer.task.train()
    count = [0]

    def synchronize():
        if trainer.device.type == 'cuda':
            torch.cuda.synchronize()

    def bare():
        trainer.step(*fixed)

    def real():
        count[0] += 1
        trainer.step(*trainer.prepare(*next(batches)))
        trainer.task.update_ema(step=count[0])
        trainer.scheduler.step_update(1)

    times = {bare: [], real: []}
    for _ in range(WARMUP_STEPS):
        bare(), real()
    for _ in range(steps):
        for run in (bare, real):
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            times[run].append(time.perf_counter() - start)
    images = len(fixed[0]) * trainer.args.world_size
    rates = [images / statistics.median(times[run]) for run in (bare, real)]
    print(f'bare step on one fixed batch: {rates[0]:.1f} images/s')
    print(f'real loop (loader, augmentation{", Mixup" if trainer.mixup else ""}'
          f'{", EMA" if trainer.task.has_ema() else ""}): {rates[1]:.1f} images/s, {rates[1] / rates[0]:.3f} of it')
