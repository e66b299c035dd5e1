"""Training of all exits at once, as a timm training task: EMA, compilation, DDP and checkpoints are timm's."""
from typing import Dict, List, Optional, Sequence

import torch
import torch.nn.functional as F
from timm.task import ClassificationTask
from timm.utils import unwrap_model

from .errors import InputError
from .models import MultiExitNet


class MultiExitTask(ClassificationTask):
    """Weighted mean of the exits' classification losses, and distillation from the last exit to the earlier ones.

    Loss: sum_k w_k CE_k / sum_k w_k (MSDNet paper, section 4, with w_k = 1) + distill_weight * mean over k < last of
    T^2 KL(softmax(last / T) || softmax(exit k / T)), where the last exit's logits take no gradient
    (Phuong and Lampert, ICCV 2019).

    Args:
        model: The network to train.
        exit_weights: One weight per exit, None for equal ones.
        distill_weight: Weight of the distillation, 0 for none.
        distill_temperature: T.
        **kwargs: As ClassificationTask (criterion, criterion_kwargs, device, dtype, verbose).

    Raises:
        InputError: not one non-negative weight per exit, or all zero.
    """

    def __init__(
            self,
            model: MultiExitNet,
            exit_weights: Optional[Sequence[float]] = None,
            distill_weight: float = 0.,
            distill_temperature: float = 2.,
            **kwargs,
    ):
        weights = list(exit_weights) if exit_weights else [1.] * model.num_exits
        if len(weights) != model.num_exits or min(weights) < 0 or sum(weights) == 0:
            raise InputError(
                f'exit weights {weights}: give {model.num_exits} numbers, none negative, not all zero, one per exit')
        model.set_exit_training(True)
        super().__init__(model, **kwargs)
        self.exit_weights = [w / sum(weights) for w in weights]
        self.distill_weight = distill_weight
        self.distill_temperature = distill_temperature

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Images (B, C, H, W) and targets, int64 (B,) or soft (B, num_classes), to the loss and the last logits."""
        # Losses in float32: a softmax over bfloat16 logits would round the gradient of confident images away.
        logits = [x.float() for x in self.trainable_module(input)]
        losses = torch.stack([self.criterion(x, target) for x in logits])
        loss = (losses * losses.new_tensor(self.exit_weights)).sum()
        if self.distill_weight > 0.:
            loss = loss + self.distill_weight * self._distillation(logits)
        return {'loss': loss, 'output': logits[-1], 'exit_losses': losses.detach()}

    def _distillation(self, logits: List[torch.Tensor]) -> torch.Tensor:
        t = self.distill_temperature
        teacher = F.log_softmax(logits[-1].detach() / t, 1)
        terms = [F.kl_div(F.log_softmax(x / t, 1), teacher, reduction='batchmean', log_target=True)
                 for x in logits[:-1]]
        return t * t * torch.stack(terms).mean()


@torch.inference_mode()
def exit_accuracies(model: torch.nn.Module, loader, amp_dtype: Optional[torch.dtype] = None) -> torch.Tensor:
    """Top-1 accuracy of every exit in percent over a loader, float64 (num_exits,), summed over processes.

    Args:
        model: A multi-exit network, possibly wrapped (DDP, compiled, EMA).
        loader: Yields (images, targets); processes of a group may get different numbers of images.
        amp_dtype: Autocast dtype, None for none.
    """
    model = unwrap_model(model)
    model.eval()
    right = None
    for images, targets in loader:
        with torch.autocast(images.device.type, dtype=amp_dtype or torch.bfloat16, enabled=amp_dtype is not None):
            logits = torch.stack(model.forward_exits(images))
        hits = (logits.argmax(-1) == targets).sum(1)
        counts = torch.cat([hits, hits.new_tensor([len(targets)])])
        right = counts if right is None else right + counts
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(right)
    return 100. * right[:-1].double().cpu() / right[-1].item()
