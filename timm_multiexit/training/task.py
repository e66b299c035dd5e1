"""Joint training of all exits as a timm training task: EMA, compilation, DDP and checkpoints are timm's."""
import math
from typing import Dict, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from timm.task import ClassificationTask, DistillationTeacher
from timm.utils import unwrap_model

from ..errors import InputError
from ..models import MultiExitNet

KD_EXITS = ('mean', 'last')


class _AllExits(torch.nn.Module):
    """A teacher whose output is the logits of all its exits, (num_exits, B, num_classes)."""

    def __init__(self, model: MultiExitNet):
        super().__init__()
        self.model = model
        self.num_classes, self.pretrained_cfg = model.num_classes, model.pretrained_cfg

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.model.forward_exits(x))


class MultiExitTask(ClassificationTask):
    """Weighted mean of the exits' losses, optionally with distillation from the last exit or from trained networks.

    Loss: sum_k w_k L_k / sum_k w_k (MSDNet paper, section 4, with w_k = 1) + distill_weight * mean over k < last of
    T^2 KL(softmax(last / T) || softmax(exit k / T)), where the last exit's logits take no gradient
    (Phuong and Lampert, ICCV 2019). L_k is the classification loss CE_k of exit k, or with a teacher
    c CE_k + (1 - c) T_t^2 KL(teacher || softmax(exit k / T_t)), where c is `task_loss_weight` (Hinton et al., 2015).

    Args:
        model: The network to train.
        exit_weights: w, one weight per exit; None for equal ones.
        distill_weight: Weight of the distillation from the last exit, 0 for none.
        distill_temperature: T.
        teacher: A trained network for the same classes, with or without exits; or several, whose mean probability is
            the target; or None. Teachers see the same augmented images, and their parameters are frozen.
        task_loss_weight: c, the share of the classification loss with a teacher, from 0 to 1.
        kd_temperature: T_t.
        kd_exits: Target from a multi-exit teacher: the 'mean' of its exits' probabilities, or its 'last' exit's.
        kd_draw: Use one of the teachers for each batch, drawn at random: the expected target at the cost of one.
        frozen: Names of modules of the network that keep their weights and BN statistics.
        **kwargs: As ClassificationTask (criterion, criterion_kwargs, device, dtype, verbose).

    Raises:
        InputError: not one non-negative weight per exit, or all zero; a share outside 0 to 1; a teacher with another
            number of classes; a name that is not a module.
    """

    def __init__(
            self,
            model: MultiExitNet,
            exit_weights: Optional[Sequence[float]] = None,
            distill_weight: float = 0.,
            distill_temperature: float = 2.,
            teacher: Union[torch.nn.Module, Sequence[torch.nn.Module], None] = None,
            task_loss_weight: float = 0.5,
            kd_temperature: float = 2.,
            kd_exits: str = 'mean',
            kd_draw: bool = False,
            frozen: Sequence[str] = (),
            **kwargs,
    ):
        weights = list(exit_weights) if exit_weights else [1.] * model.num_exits
        if len(weights) != model.num_exits or min(weights) < 0 or sum(weights) == 0:
            raise InputError(
                f'exit weights {weights}: give one number per exit ({model.num_exits}), none negative, not all zero')
        if not 0. <= task_loss_weight <= 1.:
            raise InputError(f'task loss weight {task_loss_weight}: it is a share, from 0 to 1')
        if kd_exits not in KD_EXITS:
            raise InputError(f"unknown teacher exits '{kd_exits}': choose one of {', '.join(KD_EXITS)}")
        modules = dict(model.named_modules())
        if unknown := [name for name in frozen if name not in modules]:
            raise InputError(f"cannot freeze '{unknown[0]}', the network has no such module: give names from "
                             "model.named_modules(), 'stages.0.layers.0' for the stem")
        teachers = [teacher] if isinstance(teacher, torch.nn.Module) else list(teacher or ())
        for each in teachers:
            if each.num_classes != model.num_classes:
                raise InputError(f'the teacher has {each.num_classes} classes and the network {model.num_classes}: '
                                 'choose a teacher trained on the same data set')
        model.set_exit_training(True)
        for name in frozen:
            modules[name].requires_grad_(False)
        super().__init__(model, **kwargs)
        self.frozen = [modules[name] for name in frozen]
        shares = torch.tensor([w / sum(weights) for w in weights], device=self.device)
        self.register_buffer('loss_weights', shares, persistent=False)
        self.last_exit_only = False  # the first phase of mixed training: the others get no gradient
        self.distill_weight = distill_weight
        self.distill_temperature = distill_temperature
        self.task_loss_weight = task_loss_weight
        self.kd_temperature = kd_temperature
        self.kd_draw = kd_draw
        self.teachers = torch.nn.ModuleList()
        self.renormalized: List[Optional[Tuple[torch.Tensor, torch.Tensor]]] = []
        for each in teachers:
            if isinstance(each, MultiExitNet) and kd_exits == 'mean':
                each = _AllExits(each)
            each.to(self.device).requires_grad_(False)
            self.teachers.append(DistillationTeacher(each, device=self.device))
        if teachers:
            mean, std = (torch.tensor(model.pretrained_cfg[name], device=self.device).view(1, -1, 1, 1)
                         for name in ('mean', 'std'))
            for teacher in self.teachers:
                # Compared once: timm's normalize_input would wait for the device at every step.
                same = torch.equal(mean, teacher.mean_kd) and torch.equal(std, teacher.std_kd)
                self.renormalized.append(None if same else (
                    std / teacher.std_kd, (mean - teacher.mean_kd) / teacher.std_kd))

    def train(self, mode: bool = True) -> 'MultiExitTask':
        """Sets the network's mode; teachers and frozen modules stay in eval mode."""
        super().train(mode)
        self.teachers.eval()
        for module in self.frozen:
            module.eval()
        return self

    def compile(self, backend: str = 'inductor', mode: Optional[str] = None, **compile_kwargs) -> torch.nn.Module:
        """Compiles the network and its teachers; returns the compiled network."""
        for teacher in self.teachers:
            teacher.compile(backend=backend, mode=mode, **compile_kwargs)
        return super().compile(backend=backend, mode=mode, **compile_kwargs)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Images (B, C, H, W) and targets, int64 (B,) or soft (B, num_classes), to the `loss` and last exit's `output`.
        """
        # Losses in float32: a softmax over bfloat16 logits rounds the gradient of confident images to zero.
        logits = [x.float() for x in self.trainable_module(input)]
        losses = torch.stack([self.criterion(x, target) for x in logits])
        if self.teachers:
            c, teacher = self.task_loss_weight, self._teacher_log_probabilities(input)
            kd = torch.stack([self._divergence(x, teacher, self.kd_temperature) for x in logits])
            losses = c * losses + (1. - c) * kd
        if self.last_exit_only:
            return {'loss': losses[-1] + 0. * losses.sum(), 'output': logits[-1]}
        loss = (losses * self.loss_weights).sum()
        if self.distill_weight > 0.:
            t = self.distill_temperature
            last = F.log_softmax(logits[-1].detach() / t, 1)
            terms = torch.stack([self._divergence(x, last, t) for x in logits[:-1]])
            loss = loss + self.distill_weight * terms.mean()
        return {'loss': loss, 'output': logits[-1]}

    @torch.no_grad()
    def _teacher_log_probabilities(self, input: torch.Tensor) -> torch.Tensor:
        """(B, num_classes) at T_t, of the mean probability over teachers and, with 'mean', over a teacher's exits.

        On CIFAR-100's validation images the last exits of three trained networks together were 75.6 % accurate, all
        their exits together 74.6 %, the best network's last exit alone 73.9 %.
        """
        teachers, targets = list(zip(self.teachers, self.renormalized)), []
        if self.kd_draw:
            teachers = [teachers[int(torch.randint(len(teachers), ()))]]
        for teacher, change in teachers:
            logits = teacher(input if change is None else input * change[0] + change[1]).float()
            log_probabilities = F.log_softmax(logits / self.kd_temperature, -1)
            if logits.ndim == 3:
                log_probabilities = log_probabilities.logsumexp(0) - math.log(len(logits))
            targets.append(log_probabilities)
        return torch.stack(targets).logsumexp(0) - math.log(len(targets))

    @staticmethod
    def _divergence(logits: torch.Tensor, target: torch.Tensor, t: float) -> torch.Tensor:
        """t^2 KL(target || softmax(logits / t)), averaged over the batch; `target` holds log probabilities."""
        return t * t * F.kl_div(F.log_softmax(logits / t, 1), target, reduction='batchmean', log_target=True)


@torch.inference_mode()
def exit_accuracies(model: torch.nn.Module, loader, amp_dtype: Optional[torch.dtype] = None) -> torch.Tensor:
    """Top-1 accuracy of every exit in percent, float64 (num_exits,), over a loader and all processes.

    Args:
        model: A multi-exit network, possibly wrapped (DDP, compiled, EMA).
        loader: Yields (images, targets); processes of a group may get different numbers of images.
        amp_dtype: Autocast dtype, None for none.
    """
    model = unwrap_model(model)
    model.eval()
    correct = torch.zeros(model.num_exits + 1, dtype=torch.int64, device=next(model.parameters()).device)
    for images, targets in loader:
        with torch.autocast(images.device.type, dtype=amp_dtype or torch.bfloat16, enabled=amp_dtype is not None):
            logits = torch.stack(model.forward_exits(images))
        hits = (logits.argmax(-1) == targets).sum(1)
        correct += torch.cat([hits, hits.new_tensor([len(targets)])])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(correct)
    return 100. * correct[:-1].double().cpu() / correct[-1].item()
