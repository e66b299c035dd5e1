"""Training throughput: what loading, augmentation and EMA cost beside the bare step."""
import itertools
import statistics

from ..inference.profile import take_turns
from .trainer import Trainer


def print_throughput(trainer: Trainer, steps: int) -> None:
    """Prints images/s of the bare step on one fixed batch and of the real loop, timed alternately in one run.

    Args:
        trainer: Its network is trained on the way.
        steps: How many of each to time; the medians are printed.
    """
    batches = itertools.chain.from_iterable(itertools.repeat(trainer.loader))  # epoch after epoch
    updates = itertools.count(1)
    fixed = trainer.prepare(*next(batches))
    trainer.task.train()

    def real():
        trainer.step(*trainer.prepare(*next(batches)))
        trainer.task.update_ema(step=next(updates))
        trainer.scheduler.step_update(1)

    times = take_turns(dict(bare=lambda: trainer.step(*fixed), real=real), steps, trainer.device, 'throughput')
    if trainer.args.rank:
        return
    images = len(fixed[0]) * trainer.args.world_size
    bare, looped = (images / statistics.median(seconds) for seconds in times.values())
    print(f'bare step on one fixed batch: {bare:.1f} images/s')
    print(f'real loop (loader, augmentation{", Mixup" if trainer.mixup else ""}'
          f'{", EMA" if trainer.task.has_ema() else ""}): {looped:.1f} images/s, {looped / bare:.3f} of it')
