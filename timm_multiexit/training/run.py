"""A training run from its first or a resumed epoch to the exported weights."""
import argparse
import logging
import signal
from contextlib import nullcontext
from pathlib import Path

import torch
from timm.task import load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import setup_default_logging
from timm.utils.distributed import world_info_from_env

from ..commands import Interruptions
from ..errors import InputError, first_line
from ..files import held
from ..pretrained.hub_files import CONFIG_FILE
from ..pretrained.record import read_config
from .run_folder import LAST_NAME, RunFolder, changed_options, check_kept, find_checkpoint, is_finished, read_checkpoint
from .throughput import print_throughput
from .trainer import Trainer

_logger = logging.getLogger('train')


def train(args: argparse.Namespace) -> None:
    """Trains a network and exports its final weights, or with `--benchmark` measures the throughput.

    SIGTERM interrupts it as Ctrl-C does: at once, or when a checkpoint that is being written is whole.

    Args:
        args: As `parse_train_args` returns them.

    Raises:
        InputError: options, data or checkpoints that cannot be used, or a loss that diverges.
        KeyboardInterrupt: with the number of the signal and a message.
    """
    setup_default_logging()
    if args.benchmark:
        trainer = Trainer(args)
        trainer.distribute()
        print_throughput(trainer, args.benchmark)
        _leave(args)
        return
    path = Path(args.output) / args.experiment
    first = world_info_from_env()[1] == 0  # it alone writes
    with Interruptions() as interruptions, held(path) if first else nullcontext():
        try:
            _train(args, path, interruptions)
        except KeyboardInterrupt as interrupt:
            number = interrupt.args[0]
            kept = (path / LAST_NAME).is_file()
            raise KeyboardInterrupt(
                number, f'stopped by {signal.Signals(number).name}: the same command with --resume auto '
                + ('resumes after the last checkpoint' if kept else 'starts again, no epoch was finished')) from None


def _train(args: argparse.Namespace, path: Path, interruptions: Interruptions) -> None:
    checkpoint = find_checkpoint(args.resume, path, args.overwrite)
    if args.overwrite:
        check_kept(path, [*args.initial_checkpoint, *args.kd_checkpoint, args.backbone_checkpoint])
    start_epoch, saved = 0, {}
    if checkpoint:
        saved = read_checkpoint(checkpoint)
        start_epoch = saved['epoch'] + 1
        _logger.info(f"Found '{checkpoint}' after epoch {saved['epoch']}")
        if args.resume == 'auto' and is_finished(path, saved, args.epochs):
            _logger.info(f"The run is finished, nothing to do: {path / 'final'}")
            return
    trainer = Trainer(args)
    changed = changed_options(saved, args) if checkpoint else {}
    for name, value in changed.items():
        now = f'--{name.replace("_", "-")} is {getattr(args, name)}'
        _logger.warning(f'{now} from epoch {start_epoch} on, {value} before')
    if checkpoint:
        _check_classes(trainer, Path(checkpoint).parent / CONFIG_FILE)
        _resume(trainer, checkpoint)
    trainer.distribute()
    trainer.scheduler.step_update(start_epoch * trainer.updates_per_epoch)

    folder = RunFolder(trainer, path, checkpoint, start_epoch, changed) if args.rank == 0 else None
    for epoch in range(start_epoch, args.epochs):
        train_metrics = trainer.train_epoch(epoch)
        evaluates = not (epoch + 1) % args.eval_interval or epoch + 1 == args.epochs
        eval_metrics = trainer.evaluate() if evaluates else {}
        if folder:
            with interruptions.deferred():
                folder.end_epoch(epoch, train_metrics, eval_metrics)
    if args.update_bn:
        trainer.update_bn()
        eval_metrics = trainer.evaluate()
        if folder:
            folder.end_update_bn(eval_metrics)
    if folder:
        folder.export()
    _leave(args)


def _leave(args: argparse.Namespace) -> None:
    if args.distributed:  # a process group that outlives the interpreter can abort it
        torch.distributed.destroy_process_group()


def _check_classes(trainer: Trainer, config: Path) -> None:
    before = read_config(config).get('label_names') if config.is_file() else None
    if before and before != trainer.config.get('label_names'):
        raise InputError('the classes are not those of the run to resume: undo what was renamed, or start another '
                         '--experiment')


def _resume(trainer: Trainer, checkpoint: str) -> None:
    """Loads weights, EMA, optimizer and loss scaler."""
    try:
        resume_task_checkpoint(
            trainer.task, checkpoint, trainer.optimizer, trainer.scaler, log_info=trainer.args.rank == 0)
        if trainer.task.has_ema():
            load_task_ema_checkpoint(trainer.task, checkpoint)
    except (RuntimeError, KeyError, ValueError) as error:
        raise InputError(
            f"cannot resume from '{checkpoint}' ({first_line(error)}): is it this run's checkpoint?") from error
