"""One training run: the network, its loaders, optimizer and schedule, and one epoch of each."""
import argparse
import logging
import random
import statistics
import time

import numpy as np
import timm
import torch
from timm.data import Mixup, create_loader, resolve_data_config
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import (
    AverageMeter,
    distribute_bn,
    init_distributed_device,
    unwrap_model,
)
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

from ..datasets import load_images, open_dataset, split_indices
from ..errors import InputError
from ..models import MultiExitNet
from ..models._fold import fold_batch_norm
from ..pretrained.load import load_mean, load_teacher
from .cpu_kernels import use_cpu_kernels
from .cuda_graph import GraphedStep
from .loader import InMemoryLoader
from .precision import muon_in_float32, slow_bfloat16
from .task import MultiExitTask, exit_accuracies

_logger = logging.getLogger('train')
AMP_DTYPES = {'bfloat16': torch.bfloat16, 'float16': torch.float16}


def seed_epoch(seed: int, epoch: int, rank: int) -> None:
    """All global generators from (seed, epoch, rank): nothing random needs to be stored to resume exactly."""
    value = (seed * 1_000_003 + epoch) * 1009 + rank
    random.seed(value)
    np.random.seed(value % 2 ** 32)
    torch.manual_seed(value)


def create_network(args: argparse.Namespace, num_classes: int) -> MultiExitNet:
    model = timm.create_model(args.model, num_classes=num_classes, drop_rate=args.drop, **args.model_kwargs)
    if not isinstance(model, MultiExitNet):
        raise InputError(f"'{args.model}' has no exits: choose one of {', '.join(timm.list_models('*_cifar*'))}")
    if args.initial_checkpoint:
        load_mean(model, args.initial_checkpoint, args.model)
    return model


def create_loaders(args: argparse.Namespace, data_config: dict, device: torch.device):
    """Training loader and validation loader; the validation images come under the test transform."""
    mean, std = data_config['mean'], data_config['std']
    common = dict(mean=mean, std=std, device=device)
    source = (args.dataset, args.data_dir)
    shards = dict(rank=args.rank, world_size=args.world_size)
    # Without held-out images the test set stands in for the log, and chooses nothing: the last checkpoint is exported.
    held_out = 'validation' if args.validation_images else 'test'
    validation = load_images(*source, held_out, args.dataset_download, args.validation_images)
    loader_eval = InMemoryLoader(*validation, 500, **common, **shards)
    if args.loader == 'memory':
        train = load_images(*source, 'train', args.dataset_download, args.validation_images)
        return InMemoryLoader(
            *train, args.batch_size, train=True, crop_padding=args.crop_padding, hflip=args.hflip, aa=args.aa,
            reprob=args.reprob, recount=args.recount, seed=args.seed, **common, **shards), loader_eval
    dataset = open_dataset(*source, train=True, download=args.dataset_download)
    index = split_indices(len(dataset), args.validation_images)[0].tolist()
    dataset.transform = None
    subset = torch.utils.data.Subset(dataset, index)
    subset.transform = None  # create_loader sets it; the subset passes images through to the data set
    loader = create_loader(
        subset, data_config['input_size'], args.batch_size, is_training=True, scale=(0.6, 1.0), ratio=(0.8, 1.25),
        hflip=0. if args.hflip == 'none' else 0.5, auto_augment=args.aa, re_prob=args.reprob, re_count=args.recount,
        mean=mean, std=std, interpolation=data_config['interpolation'], num_workers=args.workers, device=device,
        distributed=args.distributed, use_prefetcher=False, persistent_workers=args.workers > 0)
    dataset.transform = subset.transform
    return loader, loader_eval


class Trainer:
    """Everything a step needs, built once from the options."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        asked = args.world_size
        self.device = init_distributed_device(args)
        if args.cuda_graph and args.distributed:
            raise InputError('--cuda-graph is for one process: leave it out, or start without torchrun')
        if args.rank == 0 and asked not in (None, args.world_size):  # the same batch in all, or other weights
            _logger.warning(f'The recipe asks for processes: {asked}, each of {args.batch_size} images. This run has '
                            f'{args.world_size}: start it by torchrun --nproc_per_node {asked}')
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
        seed_epoch(args.seed, -1 % 2 ** 20, 0)  # the same initial weights on every process

        num_classes = args.num_classes or count_classes(args)
        model = create_network(args, num_classes)
        self.data_config = resolve_data_config(model=model)
        model.to(self.device, memory_format=torch.channels_last if args.channels_last else torch.contiguous_format)
        self.metrics = [*(f'top1_exit{k + 1}' for k in range(model.num_exits)), 'top1_mean']

        self.loader, self.loader_eval = create_loaders(args, self.data_config, self.device)
        self.mixup = None
        if args.mixup > 0. or args.cutmix > 0.:
            self.mixup = Mixup(
                mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, prob=args.mixup_prob,
                switch_prob=args.mixup_switch_prob, mode=args.mixup_mode, label_smoothing=args.smoothing,
                num_classes=num_classes)
        # While mixup is off its targets still come soft and smoothed, so one criterion serves the whole run.
        loss = dict(soft_targets=True) if self.mixup else dict(smoothing=args.smoothing)
        files = args.kd_checkpoint or [''] * len(args.kd_model_name)
        teachers = [fold_batch_norm(load_teacher(*pair, num_classes, args.kd_model_kwargs))  # folded, it runs faster
                    for pair in zip(args.kd_model_name, files)]
        self.task = MultiExitTask(
            model, args.exit_weights, args.distill_weight, args.distill_temperature, teachers, args.task_loss_weight,
            args.kd_temperature, args.kd_exits, args.kd_draw, args.freeze, criterion_kwargs=loss, device=self.device)
        capturable = dict(capturable=True) if args.cuda_graph else {}
        self.optimizer = create_optimizer_v2(model, **optimizer_kwargs(args), **capturable)  # after the task's freezing
        self.graphed_step = None
        if args.cpu_kernels:
            use_cpu_kernels(model)
        if args.model_ema:
            self.task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
        if args.torchcompile:
            self.task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
        self.updates_per_epoch = len(self.loader)
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer, **{**scheduler_kwargs(args), 'num_epochs': max(args.epochs, 1)},
            updates_per_epoch=self.updates_per_epoch)

    def distribute(self) -> None:
        """Wraps the network for several processes; after a checkpoint was loaded, so that all start from it."""
        if self.args.distributed:
            ids = [self.device] if self.device.type != 'cpu' else None
            self.task.prepare_distributed(device_ids=ids)

    def prepare(self, images: torch.Tensor, targets: torch.Tensor):
        images, targets = images.to(self.device), targets.to(self.device)
        if self.mixup is None:
            return images, targets
        even = len(images) // 2 * 2  # mixup pairs images
        return self.mixup(images[:even], targets[:even])

    def gradients(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Forward and backward; returns the loss."""
        with torch.autocast(self.device.type, dtype=self.amp_dtype or torch.bfloat16, enabled=bool(self.amp_dtype)):
            loss = self.task(images, targets)['loss']
        loss.backward()
        if self.args.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(self.task.get_clip_parameters(), self.args.clip_grad)
        return loss

    def step(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Forward, backward, update; returns the loss, left on the device."""
        if self.args.cuda_graph:
            self.graphed_step = self.graphed_step or GraphedStep(
                self.gradients, unwrap_model(self.task.get_trainable_module()), self.optimizer, images, targets)
            return self.graphed_step(images, targets)
        loss = self.gradients(images, targets)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def begin_epoch(self, epoch: int) -> None:
        """Everything random of a pass over the training images follows from its number."""
        seed_epoch(self.args.seed, epoch, self.args.rank)
        if hasattr(self.loader, 'set_epoch'):
            self.loader.set_epoch(epoch)
        elif self.args.distributed:
            self.loader.sampler.set_epoch(epoch)

    def train_epoch(self, epoch: int) -> dict:
        """One epoch; returns the mean loss, the rate in images/s over all processes and the learning rate."""
        args = self.args
        self.begin_epoch(epoch)
        if self.mixup is not None and args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
            self.mixup.mixup_enabled = False
        self.task.train()
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
                losses.update(total.item() / since, since)
                total = None
                if not np.isfinite(losses.val):
                    raise InputError(f'the loss is {losses.val} in epoch {epoch}: use a smaller --lr')
                rate = seen / (time.perf_counter() - start)
                _logger.log(  # of several processes the first reports, of its own share
                    logging.DEBUG if self.args.rank else logging.INFO,
                    f'Train: {epoch} [{index + 1:>4d}/{self.updates_per_epoch}]  Loss: {losses.val:.4f} '
                    f'({losses.avg:.4f})  {rate:.1f} images/s  LR: {self.optimizer.param_groups[0]["lr"]:.3e}')
        if args.distributed:
            distribute_bn(self.task.get_trainable_module(), args.world_size, reduce=True)
        rate = seen / (time.perf_counter() - start)
        return {'loss': losses.avg, 'images_per_s': round(rate, 1)}

    def update_bn(self) -> None:
        """BN statistics of the final weights, of the EMA if one is kept, anew from one pass over the training images.

        The mean of weights computes other activations than the mean of their statistics tells (Izmailov et al., UAI
        2018, section 3.2).
        """
        args, network = self.args, unwrap_model(self.task.get_trainable_module(ema=self.task.has_ema()))
        self.begin_epoch(args.epochs)
        batches = tqdm(self.loader, desc='BN statistics', unit='batch', disable=None if args.rank == 0 else True)
        update_bn(batches, network, self.device)
        if args.distributed:
            distribute_bn(network, args.world_size, reduce=True)

    def evaluate(self) -> dict:
        """Top-1 accuracy in percent of every exit, and their mean, of the EMA if one is kept."""
        network = self.task.get_trainable_module(ema=self.task.has_ema())
        accuracies = exit_accuracies(network, self.loader_eval, self.amp_dtype).tolist()
        values = [*accuracies, sum(accuracies) / len(accuracies)]
        return {name: round(value, 3) for name, value in zip(self.metrics, values)}


def accuracy_line(metrics: dict) -> str:
    line = ' '.join(f'{v:.2f}' for k, v in metrics.items() if k.startswith('top1_exit'))
    return f'top-1 per exit {line}  mean {metrics["top1_mean"]:.2f}'


def count_classes(args: argparse.Namespace) -> int:
    _, targets = load_images(args.dataset, args.data_dir, 'test', args.dataset_download)
    return int(targets.max()) + 1


def benchmark(trainer: Trainer, steps: int) -> None:
    """Images/s of the bare step on one fixed batch beside those of the real loop, in turns within one run."""
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
    for _ in range(3):
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
