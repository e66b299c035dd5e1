#!/usr/bin/env python3
"""Train a multi-exit network with timm's data, mixup, loss, optimizer, scheduler, EMA and checkpoint utilities.

    python train_timm.py --config timm_multiexit/recipes/msfuse_cifar.cifar10.yaml --data-dir DATA --output RUNS
    torchrun --nproc_per_node 2 train_timm.py ...

Options carry timm's names; a YAML file given by --config sets their defaults and the command line overrides it. A run
lives in OUTPUT/EXPERIMENT: the same command again with --resume auto goes on behind the last finished epoch and ends
with the weights that the uninterrupted run would have had. When the schedule is done, `final/` there holds the weights
(EMA if kept) as safetensors, with the recipe and the summary.
"""
import logging
import pickle
from pathlib import Path

import torch
import yaml
from timm.task import load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import (
    CheckpointSaver,
    setup_default_logging,
    unwrap_model,
    update_summary,
)
from timm.utils.summary import trim_summary

from timm_multiexit.errors import InputError
from timm_multiexit.training.final_weights import export
from timm_multiexit.training.options import parse_train_args
from timm_multiexit.training.trainer import Trainer, accuracy_line, benchmark

_logger = logging.getLogger('train')


def main(argv=None) -> None:
    args = parse_train_args(__doc__.splitlines()[0], argv)
    setup_default_logging()
    trainer = Trainer(args)
    if args.benchmark:
        benchmark(trainer, args.benchmark)
        return
    folder = Path(args.output) / args.experiment
    saver, start_epoch = None, 0
    resume = args.resume
    if resume == 'auto':
        resume = str(last) if (last := folder / 'last.pth.tar').is_file() else ''
    if resume:
        try:
            start_epoch = resume_task_checkpoint(trainer.task, resume, trainer.optimizer, log_info=args.rank == 0)
            if trainer.task.has_ema():
                load_task_ema_checkpoint(trainer.task, resume)
        except (OSError, RuntimeError, KeyError, ValueError, EOFError, pickle.UnpicklingError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"cannot resume from '{resume}' ({reason}): is it this run's checkpoint?") from error
    trainer.distribute()
    trainer.scheduler.step_update(start_epoch * trainer.updates_per_epoch)
    if args.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        skip = ('config', 'data_dir', 'output', 'resume', 'rank', 'local_rank', 'distributed', 'device',
                'experiment', 'sched_on_updates', 'dataset_download', 'threads', 'benchmark')
        recipe = {k: v for k, v in vars(args).items() if k not in skip}
        (folder / 'recipe.yaml').write_text(yaml.safe_dump(recipe, sort_keys=False))
        saver = CheckpointSaver(
            unwrap_model(trainer.task.get_trainable_module()), trainer.optimizer, args=args, task=trainer.task,
            checkpoint_dir=str(folder), max_history=args.checkpoint_hist)
        if resume:
            saver.load_state_dict_from_checkpoint(resume)
        trim_summary(folder / 'summary.csv', start_epoch)
        _logger.info(f'{args.model}: {len(trainer.loader)} batches of {args.batch_size} x {args.world_size}, '
                     f'{args.epochs - start_epoch} epochs to go, in {folder}')
    for epoch in range(start_epoch, args.epochs):
        train_metrics = trainer.train_epoch(epoch)
        if (epoch + 1) % args.eval_interval and epoch + 1 < args.epochs:
            eval_metrics = {}
        else:
            eval_metrics = trainer.evaluate()
        if saver is None:
            continue
        if eval_metrics:
            _logger.info(f'Epoch {epoch}: {accuracy_line(eval_metrics)}')
        # The row first: a row of an epoch that is run again is dropped at resume, a missing one could not be made up.
        update_summary(epoch, train_metrics, dict.fromkeys(trainer.metrics, '') | eval_metrics, folder / 'summary.csv',
                       lr=trainer.optimizer.param_groups[0]['lr'])
        if not (epoch + 1) % args.checkpoint_interval or epoch + 1 == args.epochs:
            saver.save_checkpoint(epoch, metric=eval_metrics.get('top1_mean'))
    if args.update_bn:
        trainer.update_bn()
        eval_metrics = trainer.evaluate()
        if saver is not None:
            _logger.info(f'With new BN statistics: {accuracy_line(eval_metrics)}')
            if not args.epochs:  # no epoch has left a row
                update_summary(0, {}, eval_metrics, folder / 'summary.csv')
    if saver is not None:
        export(trainer, folder)
    if args.distributed:  # its threads must not run any more when the interpreter ends
        torch.distributed.destroy_process_group()


if __name__ == '__main__':
    try:
        main()
    except InputError as error:
        raise SystemExit(f'train_timm.py: error: {error}') from None
