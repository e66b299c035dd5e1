"""A training run from its first or a resumed epoch to the exported weights."""
import argparse
import pickle
from pathlib import Path

import torch
from timm.task import load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import setup_default_logging

from ..errors import InputError
from .run_folder import RunFolder
from .throughput import print_throughput
from .trainer import Trainer


def train(args: argparse.Namespace) -> None:
    """Trains a network and exports its final weights, or with `--benchmark` measures the throughput.

    Args:
        args: As `parse_train_args` returns them.

    Raises:
        InputError: options, data or checkpoints that cannot be used, or a loss that diverges.
    """
    setup_default_logging()
    trainer = Trainer(args)
    if args.benchmark:
        print_throughput(trainer, args.benchmark)
        return
    path = Path(args.output) / args.experiment
    checkpoint = _checkpoint_to_resume(args.resume, path)
    start_epoch = _resume(trainer, checkpoint) if checkpoint else 0
    trainer.distribute()
    trainer.scheduler.step_update(start_epoch * trainer.updates_per_epoch)

    folder = RunFolder(trainer, path, start_epoch, checkpoint) if args.rank == 0 else None  # one process writes
    for epoch in range(start_epoch, args.epochs):
        train_metrics = trainer.train_epoch(epoch)
        evaluates = not (epoch + 1) % args.eval_interval or epoch + 1 == args.epochs
        eval_metrics = trainer.evaluate() if evaluates else {}
        if folder:
            folder.end_epoch(epoch, train_metrics, eval_metrics)
    if args.update_bn:
        trainer.update_bn()
        eval_metrics = trainer.evaluate()
        if folder:
            folder.end_update_bn(eval_metrics)
    if folder:
        folder.export()
    if args.distributed:  # a process group that outlives the interpreter can abort it
        torch.distributed.destroy_process_group()


def _checkpoint_to_resume(resume: str, folder: Path) -> str:
    """The file that `--resume` stands for; '' to start anew."""
    if resume != 'auto':
        return resume
    last = folder / 'last.pth.tar'
    return str(last) if last.is_file() else ''


def _resume(trainer: Trainer, checkpoint: str) -> int:
    """Loads weights, EMA and optimizer; returns the epoch to go on with."""
    try:
        epoch = resume_task_checkpoint(
            trainer.task, checkpoint, trainer.optimizer, log_info=trainer.args.rank == 0)
        if trainer.task.has_ema():
            load_task_ema_checkpoint(trainer.task, checkpoint)
    except (OSError, RuntimeError, KeyError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"cannot resume from '{checkpoint}' ({reason}): is it this run's checkpoint?") from error
    return epoch
