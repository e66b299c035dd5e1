"""The files of a run: recipe, history, summary, checkpoints, and at the end the final weights."""
import logging
import os
import secrets
import shutil
from pathlib import Path
from typing import Any, Dict

import yaml
from safetensors.torch import save_file
from timm.utils import CheckpointSaver, unwrap_model, update_summary
from timm.utils.summary import trim_summary

from ..files import sha256
from ..stopping.config import RECIPE_NAME
from .history import SUMMARY_NAME, History, initial_history
from .trainer import Trainer

_logger = logging.getLogger('train')
# Options that say where a run took place, not what it computed.
_NOT_IN_RECIPE = (
    'config', 'data_dir', 'output', 'resume', 'rank', 'local_rank', 'distributed', 'device', 'experiment',
    'sched_on_updates', 'dataset_download', 'threads', 'benchmark', 'run_id')


class RunFolder:
    """Written by one process: a summary row per epoch, checkpoints, and `final/` when the run is done.

    Args:
        trainer: Of the run.
        path: The folder; created if missing.
        start_epoch: First epoch to come; rows of the summary from there on are dropped.
        checkpoint: File that the run was resumed from, or ''.
    """

    def __init__(self, trainer: Trainer, path: Path, start_epoch: int, checkpoint: str):
        self.trainer, self.path = trainer, path
        args = trainer.args
        path.mkdir(parents=True, exist_ok=True)
        recipe = {k: v for k, v in vars(args).items() if k not in _NOT_IN_RECIPE}
        (path / RECIPE_NAME).write_text(yaml.safe_dump(recipe, sort_keys=False), encoding='utf-8')
        self._begin_history(recipe, checkpoint)
        self.saver = CheckpointSaver(
            unwrap_model(trainer.task.get_trainable_module()), trainer.optimizer, args=args, task=trainer.task,
            checkpoint_dir=str(path), max_history=args.checkpoint_hist)
        if checkpoint:
            self.saver.load_state_dict_from_checkpoint(checkpoint)
        self.summary = path / SUMMARY_NAME
        trim_summary(self.summary, start_epoch)
        _logger.info(f'{args.model}: {len(trainer.loader)} batches of {args.batch_size} x {args.world_size}, '
                     f'{args.epochs - start_epoch} epochs to go, in {path}')

    def _begin_history(self, recipe: Dict[str, Any], checkpoint: str) -> None:
        """Records this run and its parents; a resumed run keeps its id and the parents it recorded first."""
        args = self.trainer.args
        resumed = History.read(Path(checkpoint).parent) if checkpoint else History()
        if resumed.steps:
            run = resumed.steps[-1].run
            self.history = History(resumed.steps, [row for row in resumed.log if row['run'] != run])
        else:
            run = f'{args.experiment}-{secrets.token_hex(4)}'
            self.history = initial_history(args.initial_checkpoint, run)
        args.run_id = run  # checkpoints carry the options, and with them the id
        self.step = self.history.steps[-1]
        self.step.options = {k: v for k, v in recipe.items() if k != 'initial_checkpoint'}  # told by the parents
        self.history.write(self.path)

    def end_epoch(self, epoch: int, train_metrics: Dict[str, float], eval_metrics: Dict[str, float]) -> None:
        """Appends the epoch to the summary, and writes a checkpoint where one is due.

        Args:
            epoch: From 0.
            train_metrics: Of `Trainer.train_epoch`.
            eval_metrics: Of `Trainer.evaluate`; {} where the epoch was not evaluated.
        """
        args = self.trainer.args
        if eval_metrics:
            _logger.info(f'Epoch {epoch}: {_accuracy_line(eval_metrics)}')
            self.step.reached = eval_metrics
        # The row before the checkpoint: on resume a surplus row is dropped, a missing one would be lost.
        update_summary(epoch, train_metrics, dict.fromkeys(self.trainer.metrics, '') | eval_metrics, self.summary,
                       lr=self.trainer.optimizer.param_groups[0]['lr'])
        if not (epoch + 1) % args.checkpoint_interval or epoch + 1 == args.epochs:
            self.saver.save_checkpoint(epoch, metric=eval_metrics.get('top1_mean'))

    def end_update_bn(self, eval_metrics: Dict[str, float]) -> None:
        """Logs the accuracies under new BN statistics; they become the summary's only row if no epoch left one."""
        _logger.info(f'With new BN statistics: {_accuracy_line(eval_metrics)}')
        self.step.reached = eval_metrics
        if not self.trainer.args.epochs:
            update_summary(0, {}, eval_metrics, self.summary)

    def export(self) -> None:
        """Writes `final/`, whole or not at all: the weights (EMA if kept) in half precision, recipe and history."""
        target, partial = self.path / 'final', self.path / 'final.partial'
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        task = self.trainer.task
        state = unwrap_model(task.get_trainable_module(ema=task.has_ema())).state_dict()
        state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
        weights = partial / 'model.safetensors'
        save_file({k: v.contiguous().cpu() for k, v in state.items()}, weights, {'format': 'pt'})
        shutil.copy(self.path / RECIPE_NAME, partial / RECIPE_NAME)
        self.step.sha256 = sha256(weights)
        self.history.write(self.path)  # a checkpoint of this run may be a parent too
        History(self.history.steps, History.read(self.path).log).write(partial)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
        _logger.info(f'Final weights: {target / "model.safetensors"}')


def _accuracy_line(metrics: Dict[str, float]) -> str:
    line = ' '.join(f'{v:.2f}' for k, v in metrics.items() if k.startswith('top1_exit'))
    return f'top-1 per exit {line}  mean {metrics["top1_mean"]:.2f}'
