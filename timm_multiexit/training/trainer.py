"""The trainer: network, loaders, optimizer and schedule of a run, and one epoch of training or evaluation."""
import argparse
import logging
import random
import time
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

import numpy as np
import timm
import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import AverageMeter, NativeScaler, distribute_bn, init_distributed_device, unwrap_model
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

from ..errors import InputError, first_line
from ..inference.preprocess import Preprocessing
from ..models import MultiExitNet
from ..models._fold import fold
from ..pretrained.load import load_mean, load_teacher
from ..pretrained.names import require_weights, without_exits
from ..pretrained.record import config_of
from .cpu_kernels import use_cpu_kernels
from .cuda_graph import GraphedStep
from .data import count_classes, describe_data, open_data
from .loader import create_loaders
from .precision import muon_in_float32, slow_bfloat16
from .regimes import prepare, starts_trained
from .task import MultiExitTask, exit_accuracies

_logger = logging.getLogger('train')
AMP_DTYPES = {'bfloat16': torch.bfloat16, 'float16': torch.float16}


def seed_epoch(seed: int, epoch: int, rank: int) -> None:
    """Seeds all global generators from (seed, epoch, rank), so that a run resumes exactly without stored states."""
    value = (seed * 1_000_003 + epoch) * 1009 + rank
    random.seed(value)
    np.random.seed(value % 2 ** 32)
    torch.manual_seed(value)


def create_network(
        args: argparse.Namespace, num_classes: int, classes: Optional[Sequence[str]] = None) -> MultiExitNet:
    """The network to train, with its initial weights.

    Args:
        args: Options of the run; those that the regime stands for are set.
        num_classes: Number of classes.
        classes: Their names, if they have any.

    Raises:
        InputError: a network without exits, or initial weights that cannot be read or do not fit.
    """
    chans = args.in_chans or (args.input_size[0] if len(args.input_size or ()) == 3 else None)
    kwargs = {**args.model_kwargs, **({} if chans is None else {'in_chans': chans})}
    if args.pretrained and 'backbone' not in kwargs:
        require_weights(args.model)
    try:
        model = timm.create_model(
            args.model, pretrained=starts_trained(args), num_classes=num_classes, drop_rate=args.drop, **kwargs)
    except Exception as error:  # of many types, as names and arguments can be wrong
        raise InputError(f"network '{args.model}' with {args.model_kwargs or 'no --model-kwargs'} cannot be created "
                         f'({first_line(error)})') from error
    if not isinstance(model, MultiExitNet):
        raise without_exits(args.model)
    if args.initial_checkpoint:
        try:  # other regimes take the last exit of these weights as one that knows the classes
            load_mean(model, args.initial_checkpoint, args.model, new_classes=args.regime == 'joint')
        except InputError as error:
            reason, misfit, _ = str(error).partition(': name the network')
            if not misfit or args.regime == 'joint':
                raise
            raise InputError(f'{reason}, as --regime {args.regime} needs: use --regime joint, or detach and '
                             'backbone=local-dir:DIR') from error
    prepare(args, model, classes)
    return model


class Trainer:
    """Everything a step needs, built once from the options.

    Args:
        args: As `parse_train_args` returns them; rank, world_size and device are set to those of the process group.

    Raises:
        InputError: options, data, teachers or initial weights that cannot be used.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        intended = args.world_size
        self.device = init_distributed_device(args)
        if args.cuda_graph and args.distributed:
            raise InputError('--cuda-graph works in one process: omit it, or start without torchrun')
        if args.rank == 0 and intended not in (None, args.world_size):  # another total batch gives other weights
            _logger.warning(f'This recipe is for {intended} processes of {args.batch_size} images each, this run has '
                            f'{args.world_size}: start it with torchrun --nproc_per_node {intended}')
        if args.threads:
            torch.set_num_threads(args.threads)
        if self.device.type == 'cuda':
            torch.backends.cudnn.benchmark = True
            torch.backends.cuda.matmul.allow_tf32 = True
        if slow_bfloat16(self.device):
            muon_in_float32()
            if args.amp and args.amp_dtype == 'bfloat16':
                _logger.warning('This CPU has no bfloat16 instructions: training in float32, as without --amp')
                args.amp = False
        self.amp_dtype = AMP_DTYPES[args.amp_dtype] if args.amp else None
        seed_epoch(args.seed, 2 ** 20 - 1, 0)  # the same initial weights in every process, unlike any epoch's seed

        splits = open_data(args)
        num_classes = args.num_classes or count_classes(splits)
        model = create_network(args, num_classes, splits.classes)
        describe_data(args, model, splits)
        self.config = config_of(model)
        size = min(model.pretrained_cfg['input_size'][1:])
        if args.crop_padding >= size:
            raise InputError(f'--crop-padding {args.crop_padding}: images of {size} pixels have room for {size - 1}')
        model.to(self.device, memory_format=torch.channels_last if args.channels_last else torch.contiguous_format)
        self.metrics = [*(f'top1_exit{k + 1}' for k in range(model.num_exits)), 'top1_mean']

        self.loader, self.loader_eval = create_loaders(args, splits, Preprocessing.of(model), self.device)
        # The test set only shows in the log; it ranks no checkpoint.
        self.ranks_checkpoints = len(splits.development) > 0
        self.mixup = None
        if args.mixup > 0. or args.cutmix > 0.:
            self.mixup = Mixup(
                mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, prob=args.mixup_prob,
                switch_prob=args.mixup_switch_prob, mode=args.mixup_mode, label_smoothing=args.smoothing,
                num_classes=num_classes)
        # Switched off, Mixup still yields soft, smoothed targets, so one criterion serves the whole run.
        loss = dict(soft_targets=True) if self.mixup else dict(smoothing=args.smoothing)
        files = args.kd_checkpoint or [''] * len(args.kd_model_name)
        size = model.pretrained_cfg['input_size']
        teachers = [load_teacher(name, file, num_classes, args.kd_model_kwargs, size, splits.classes)
                    for name, file in zip(args.kd_model_name, files)]
        self.task = MultiExitTask(
            model, args.exit_weights, args.distill_weight, args.distill_temperature,
            [fold(teacher) for teacher in teachers], args.task_loss_weight,  # faster
            args.kd_temperature, args.kd_exits, args.kd_draw, args.freeze, criterion_kwargs=loss, device=self.device)
        capturable = dict(capturable=True) if args.cuda_graph else {}
        self.optimizer = self._create(
            '--opt', create_optimizer_v2, model, **optimizer_kwargs(args), **capturable)  # after the task's freezing
        # Float16 gradients below 6e-8 would vanish.
        self.scaler = NativeScaler(self.device.type) if self.amp_dtype == torch.float16 else None
        self.graphed_step = None
        if args.cpu_kernels:
            use_cpu_kernels(model)
        if args.model_ema:
            self.task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
        if args.torchcompile:
            self.task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
        self.updates_per_epoch = len(self.loader)
        self.scheduler, _ = self._create(
            '--sched', create_scheduler_v2, self.optimizer, updates_per_epoch=self.updates_per_epoch,
            **{**scheduler_kwargs(args), 'num_epochs': max(args.epochs, 1)})

    def _create(self, option: str, create: Callable, *args, **kwargs) -> Any:
        try:
            return create(*args, **kwargs)
        except Exception as error:  # of many types, as arguments can be wrong
            name = getattr(self.args, option[2:])
            raise InputError(f'{option} {name} cannot be used with these options ({first_line(error)})') from error

    def distribute(self) -> None:
        """Wraps the network for several processes; to be called after a checkpoint is loaded, so all start from it."""
        if self.args.distributed:
            ids = [self.device] if self.device.type != 'cpu' else None
            self.task.prepare_distributed(device_ids=ids)

    def prepare(self, images: torch.Tensor, targets: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """A batch on the device, mixed if the recipe says so: targets int64 (B,) become soft (B, num_classes)."""
        images, targets = images.to(self.device), targets.to(self.device)
        if self.mixup is None:
            return images, targets
        if len(images) == 1:  # of a batch whose other files cannot be read: mixed with itself
            images, targets = images.repeat(2, 1, 1, 1), targets.repeat(2)
        even = len(images) // 2 * 2  # Mixup pairs images
        return self.mixup(images[:even], targets[:even])

    def loss(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss of a batch, with its graph."""
        with torch.autocast(self.device.type, dtype=self.amp_dtype or torch.bfloat16, enabled=bool(self.amp_dtype)):
            return self.task(images, targets)['loss']

    def gradients(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Forward, backward and gradient clipping; returns the loss."""
        loss = self.loss(images, targets)
        loss.backward()
        if self.args.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(self.task.get_clip_parameters(), self.args.clip_grad)
        return loss

    def step(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Forward, backward and update; returns the loss, detached and left on the device."""
        if self.args.cuda_graph:
            self.graphed_step = self.graphed_step or GraphedStep(
                self.gradients, unwrap_model(self.task.get_trainable_module()), self.optimizer, images, targets)
            if images.shape != self.graphed_step.images.shape:
                raise InputError('--cuda-graph needs batches of one size, and files that cannot be read made one '
                                 'smaller: remove those named above and resume')
            return self.graphed_step(images, targets)
        if self.scaler:
            loss = self.loss(images, targets)
            self.scaler(loss, self.optimizer, self.args.clip_grad, parameters=self.task.get_clip_parameters())
        else:
            loss = self.gradients(images, targets)
            self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def begin_epoch(self, epoch: int) -> None:
        """Seeds a pass over the training images: everything random in it follows from its number."""
        seed_epoch(self.args.seed, epoch, self.args.rank)
        self.loader.set_epoch(epoch)

    def train_epoch(self, epoch: int) -> Dict[str, float]:
        """Trains for one epoch, numbered from 0.

        Returns:
            The mean `loss`, and `images_per_s` over all processes.

        Raises:
            InputError: the loss is not finite.
        """
        args = self.args
        self.begin_epoch(epoch)
        if self.mixup is not None and args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
            self.mixup.mixup_enabled = False
        self.task.train()
        self.task.last_exit_only = epoch < (args.backbone_epochs or 0)
        losses, seen, start = AverageMeter(), 0, time.perf_counter()
        total = None
        for index, (images, targets) in enumerate(self.loader):
            images, targets = self.prepare(images, targets)
            loss = self.step(images, targets)
            update = epoch * self.updates_per_epoch + index + 1
            self.task.update_ema(step=update)
            self.scheduler.step_update(update)
            seen += len(images) * args.world_size
            total = loss if total is None else total + loss
            if (index + 1) % args.log_interval == 0 or index + 1 == self.updates_per_epoch:
                since = (index % args.log_interval) + 1
                losses.update(total.item() / since, since)  # the only wait for the device
                total = None
                if not np.isfinite(losses.val):
                    raise InputError(f'the loss is {losses.val} in epoch {epoch}: use a smaller --lr')
                rate = seen / (time.perf_counter() - start)
                _logger.log(  # the first process reports, its own share of the batches
                    logging.DEBUG if args.rank else logging.INFO,
                    f'Train: {epoch} [{index + 1:>4d}/{self.updates_per_epoch}]  Loss: {losses.val:.4f} '
                    f'({losses.avg:.4f})  {rate:.1f} images/s  LR: {self.optimizer.param_groups[0]["lr"]:.3e}')
        if args.distributed:
            for ema in (False, True) if self.task.has_ema() else (False,):  # each process has seen its own images
                distribute_bn(unwrap_model(self.task.get_trainable_module(ema=ema)), args.world_size, reduce=True)
        rate = seen / (time.perf_counter() - start)
        return {'loss': losses.avg, 'images_per_s': round(rate, 1)}

    def update_bn(self) -> None:
        """Recomputes the BN statistics of the final weights (EMA if kept) in one pass over the training images.

        The mean of several weights computes other activations than the mean of their statistics describes (Izmailov
        et al., UAI 2018, section 3.2).
        """
        args, network = self.args, unwrap_model(self.task.get_trainable_module(ema=self.task.has_ema()))
        self.begin_epoch(args.epochs)
        batches = tqdm(self.loader, desc='BN statistics', unit='batch', disable=None if args.rank == 0 else True)
        update_bn(batches, network, self.device)
        if args.distributed:
            distribute_bn(network, args.world_size, reduce=True)

    def evaluate(self) -> Dict[str, float]:
        """Top-1 accuracy of every exit and their mean, in percent, with the EMA weights if kept."""
        network = self.task.get_trainable_module(ema=self.task.has_ema())
        # Not in float16: early in training RANet's maps are too large for it, with statistics that are not yet fitted.
        dtype = None if self.scaler else self.amp_dtype
        accuracies = exit_accuracies(network, self.loader_eval, dtype).tolist()
        values = [*accuracies, sum(accuracies) / len(accuracies)]
        return {name: round(value, 3) for name, value in zip(self.metrics, values)}
