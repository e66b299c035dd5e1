"""The files of a run: recipe, history, summary, checkpoints, and at the end the final weights.

Each is replaced by one rename, so that a kill at any moment leaves a run that `--resume auto` continues.
"""
import argparse
import io
import itertools
import logging
import os
import secrets
import shutil
from pathlib import Path
from typing import Any, Dict, List, Sequence

import yaml
from safetensors.torch import save
from timm.utils import CheckpointSaver, unwrap_model

from ..errors import InputError, first_line
from ..files import sha256, write_csv, write_json, written_beside
from ..pretrained.hub_files import CONFIG_FILE, WEIGHTS_FILE
from ..pretrained.load import stored_checkpoint
from ..stopping.config import RECIPE_NAME
from .history import SUMMARY_NAME, History, initial_history, read_rows
from .trainer import Trainer

_logger = logging.getLogger('train')
LAST_NAME = 'last.pth.tar'
# Options that say where a run took place, not what it computed.
_NOT_IN_RECIPE = (
    'config', 'data_dir', 'output', 'resume', 'rank', 'local_rank', 'distributed', 'device', 'experiment',
    'sched_on_updates', 'dataset_download', 'threads', 'benchmark', 'run_id', 'overwrite')


# What a checkpoint is a checkpoint of; a run that is resumed cannot change it.
_FIXED = ('model', 'model_kwargs', 'regime', 'num_classes', 'dataset', 'validation_images', 'certification_images',
          'input_size', 'in_chans', 'pretrained', 'loader', 'freeze', 'opt', 'opt_args', 'momentum', 'weight_decay',
          'model_ema', 'cuda_graph')


def find_checkpoint(resume: str, folder: Path, overwrite: bool = False) -> str:
    """The file that `--resume` stands for; '' to start anew.

    Raises:
        InputError: that would overwrite another run.
    """
    last = folder / LAST_NAME
    if resume == 'auto' and last.is_file():
        return str(last)
    used = [path.name for path in _results(folder)]
    own = resume not in ('', 'auto') and Path(resume).resolve().parent == folder.resolve()
    if used and not own and not overwrite:
        advice = 'no checkpoint to resume from' if resume == 'auto' else 'add --resume auto to continue it'
        raise InputError(f"'{folder}' holds a run ({', '.join(sorted(used)[:3])}): "
                         f'{advice}, choose another --experiment, or --overwrite it')
    return '' if resume == 'auto' else resume


def _results(folder: Path) -> List[Path]:
    """What a run left that another would overwrite; what others put beside it, such as final-backbone, is theirs."""
    patterns = ('*.pth.tar', 'final', 'final.partial', 'final.[0-9]*')
    return [path for pattern in patterns for path in folder.glob(pattern)]


def check_kept(folder: Path, files: Sequence[str]) -> None:
    """Checks that a run which replaces the one in a folder does not start from its files.

    Raises:
        InputError: it does.
    """
    for old in _results(folder):
        for file in files:
            if file and Path(file).resolve().is_relative_to(old.resolve()):
                raise InputError(f"--overwrite would delete '{file}', which this run needs: choose another "
                                 '--experiment')


def read_checkpoint(path: str) -> Dict[str, Any]:
    """A checkpoint of a run, its tensors mapped from the file.

    Raises:
        InputError: it cannot be read, or is not one of train_timm.py.
    """
    try:
        checkpoint = stored_checkpoint(path, mmap=True)
        checkpoint['epoch'], checkpoint['args'].run_id, checkpoint['saver']
    except Exception as error:  # whatever a damaged or foreign file makes torch raise
        raise InputError(
            f"cannot resume from '{path}' ({first_line(error)}): give a checkpoint of train_timm.py") from error
    return checkpoint


def changed_options(checkpoint: Dict[str, Any], args: argparse.Namespace) -> Dict[str, Any]:
    """What options of a run that is resumed were before, where they are others now.

    Raises:
        InputError: a change that no run can make.
    """
    own = vars(checkpoint['args'])
    args.initial_checkpoint = own.get('initial_checkpoint', args.initial_checkpoint)  # told by the run's parents
    args.loader = args.loader or own.get('loader')  # None: chosen by the images
    changed = {k: own[k] for k, v in _recipe(args).items() if k in own and own[k] != v}
    for name in _FIXED:
        if name in changed:
            raise InputError(f'--{name.replace("_", "-")} {getattr(args, name)} does not fit the run to resume, which '
                             f'has {changed[name]}: keep that, or start another --experiment')
    if args.epochs <= checkpoint['epoch'] and 'epochs' in changed:
        raise InputError(f"--epochs {args.epochs}: the run to resume has done {checkpoint['epoch'] + 1}: ask for more")
    return changed


def is_finished(folder: Path, checkpoint: Dict[str, Any], epochs: int) -> bool:
    """Whether the run has done its epochs and its final weights are there."""
    final, steps = folder / 'final' / WEIGHTS_FILE, History.read(folder).steps
    return (checkpoint['epoch'] + 1 == epochs and final.is_file() and bool(steps)
            and steps[-1].sha256 == sha256(final))


def _recipe(args: argparse.Namespace) -> Dict[str, Any]:
    return {k: v for k, v in vars(args).items() if k not in _NOT_IN_RECIPE}


class _Saver(CheckpointSaver):
    """timm's, with each file replaced by one rename; what a kill kept from being ranked is ranked on resume."""

    def _save(self, save_path, epoch, metric=None):
        buffer = io.BytesIO()  # on a full disk torch.save would hide the reason
        super()._save(buffer, epoch, metric)
        with written_beside(Path(self.checkpoint_dir) / LAST_NAME) as partial:
            partial.write_bytes(buffer.getbuffer())

    def _replace(self, src, dst):
        pass  # `_save` did

    def _duplicate(self, src, dst):
        if os.path.exists(dst) and os.path.samefile(src, dst):
            return  # ranked before a kill; between links of one file a rename does nothing
        with written_beside(dst) as partial:
            try:
                os.link(src, partial)
            except OSError:  # no links here
                shutil.copyfile(src, partial)

    def load_state_dict(self, state_dict):
        epoch, metric = state_dict['pending']
        super().load_state_dict({**state_dict, 'pending': (None, None)})
        self._save = lambda *args: None
        self.save_checkpoint(epoch, metric)
        del self._save


class RunFolder:
    """Written by one process: a summary row per epoch, checkpoints, and `final/` when the run is done.

    Args:
        trainer: The trainer of the run.
        path: The folder.
        checkpoint: File that the run was resumed from, or ''.
        start_epoch: First epoch to come; rows of the summary from there on are dropped.
        changed: What `changed_options` returned.
    """

    def __init__(self, trainer: Trainer, path: Path, checkpoint: str, start_epoch: int, changed: Dict[str, Any]):
        self.trainer, self.path = trainer, path
        args = trainer.args
        if not checkpoint:  # with --overwrite there may be another run
            for old in _results(path):
                shutil.rmtree(old) if old.is_dir() else old.unlink()
        self._begin_history(checkpoint, start_epoch, changed)
        write_json(path / CONFIG_FILE, trainer.config)
        with written_beside(path / RECIPE_NAME) as partial:
            partial.write_text(yaml.safe_dump(_recipe(args), sort_keys=False), encoding='utf-8')
        self.saver = _Saver(
            unwrap_model(trainer.task.get_trainable_module()), trainer.optimizer, args=args, task=trainer.task,
            amp_scaler=trainer.scaler, checkpoint_dir=str(path), max_history=args.checkpoint_hist)
        if checkpoint:
            if Path(checkpoint).resolve() != (path / LAST_NAME).resolve():
                self.saver._duplicate(checkpoint, path / LAST_NAME)
            self.saver.load_state_dict_from_checkpoint(checkpoint)
        self.summary = path / SUMMARY_NAME
        logged = read_rows(Path(checkpoint).parent / SUMMARY_NAME) if checkpoint else []
        self.rows = [row for row in logged if int(row['epoch']) < start_epoch]
        write_csv(self.summary, self.rows)
        for row in self.rows:
            if row['eval_top1_mean']:
                self.step.reached = {name: float(row[f'eval_{name}']) for name in trainer.metrics}
        _logger.info(f'{args.model}: {len(trainer.loader)} batches of {args.batch_size} x {args.world_size}, '
                     f'{args.epochs - start_epoch} epochs to go, in {path}')

    def _begin_history(self, checkpoint: str, start_epoch: int, changed: Dict[str, Any]) -> None:
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
        self.step.options = {k: v for k, v in _recipe(args).items() if k != 'initial_checkpoint'}  # told by the parents
        self.step.sha256 = ''
        if changed:
            self.step.before[start_epoch] = changed
        self.history.write(self.path)

    def end_epoch(self, epoch: int, train_metrics: Dict[str, float], eval_metrics: Dict[str, float]) -> None:
        """Appends the epoch to the summary, and writes a checkpoint where one is due.

        Args:
            epoch: From 0.
            train_metrics: What `Trainer.train_epoch` returned.
            eval_metrics: What `Trainer.evaluate` returned; {} where the epoch was not evaluated.
        """
        args = self.trainer.args
        if eval_metrics:
            _logger.info(f'Epoch {epoch}: {_accuracy_line(eval_metrics)}')
            self.step.reached = eval_metrics
        # The row before the checkpoint: on resume a surplus row is dropped, a missing one would be lost.
        self._add_row(epoch, train_metrics, eval_metrics, lr=self.trainer.optimizer.param_groups[0]['lr'])
        if not (epoch + 1) % args.checkpoint_interval or epoch + 1 == args.epochs:
            ranked = eval_metrics if self.trainer.ranks_checkpoints else {}
            self.saver.save_checkpoint(epoch, metric=ranked.get('top1_mean'))

    def end_update_bn(self, eval_metrics: Dict[str, float]) -> None:
        """Logs the accuracies under new BN statistics; they become the summary's only row if no epoch left one."""
        _logger.info(f'With new BN statistics: {_accuracy_line(eval_metrics)}')
        self.step.reached = eval_metrics
        if not self.trainer.args.epochs:
            self._add_row(0, {}, eval_metrics)

    def _add_row(self, epoch: int, train_metrics: Dict[str, float], eval_metrics: Dict[str, float], **more) -> None:
        evaluated = {f'eval_{name}': eval_metrics.get(name, '') for name in self.trainer.metrics}
        trained = {f'train_{name}': value for name, value in train_metrics.items()}
        self.rows.append(dict(epoch=epoch, **trained, **evaluated, **more))
        write_csv(self.summary, self.rows)

    def export(self) -> None:
        """Writes `final/`, whole or not at all: the weights (EMA if kept) in half precision, recipe and history.

        A folder of other weights, with what was calibrated for them, is kept under the next free name (`final.1`).

        Raises:
            InputError: weights that are not finite, or too large for half precision.
        """
        target, partial = self.path / 'final', self.path / 'final.partial'
        task = self.trainer.task
        state = unwrap_model(task.get_trainable_module(ema=task.has_ema())).state_dict()
        frozen = tuple(f'{name}.' for name in self.trainer.args.freeze)  # these stay what they were, to the bit
        state = {k: (v.half() if v.is_floating_point() and not k.startswith(frozen) else v).contiguous().cpu()
                 for k, v in state.items()}
        if wrong := [k for k, v in state.items() if not v.isfinite().all()]:
            raise InputError(f"the weights are not finite in half precision ('{wrong[0]}'), and not exported: use a "
                             'smaller --lr')
        shutil.rmtree(partial, ignore_errors=True)
        with written_beside(partial / WEIGHTS_FILE) as file:
            file.write_bytes(save(state, {'format': 'pt'}))
        for name in (RECIPE_NAME, CONFIG_FILE):
            shutil.copy(self.path / name, partial / name)
        self.step.sha256 = sha256(partial / WEIGHTS_FILE)
        self.history.write(self.path)  # a checkpoint of this run may be a parent too
        History(self.history.steps, History.read(self.path).log).write(partial)
        if target.exists():
            os.replace(target, next(path for k in itertools.count(1)
                                    if not (path := self.path / f'final.{k}').exists()))
        os.replace(partial, target)
        _logger.info(f'Final weights: {target / WEIGHTS_FILE}')


def _accuracy_line(metrics: Dict[str, float]) -> str:
    line = ' '.join(f'{v:.2f}' for k, v in metrics.items() if k.startswith('top1_exit'))
    return f'top-1 per exit {line}  mean {metrics["top1_mean"]:.2f}'
