"""What a finished run leaves: its weights with the recipe, the summary and the runs that led to it."""
import logging
import os
import shutil
from pathlib import Path

from safetensors.torch import save_file
from timm.utils import (
    unwrap_model,
)

from .lineage import RUN_FILES, write_earlier_runs
from .trainer import Trainer

_logger = logging.getLogger('train')


def export(trainer: Trainer, folder: Path) -> None:
    """The final weights (EMA if kept) in half precision, the recipe and the summary; written beside and renamed.

    The recipes and summaries of the runs that led to the weights this one started from come along, as `run1-...` for
    the first of them and so on; where it started from the mean of several, those that led to any of them.
    """
    target, partial = folder / 'final', folder / 'final.partial'
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    network = unwrap_model(trainer.task.get_trainable_module(ema=trainer.task.has_ema()))
    state = {k: v.half() if v.is_floating_point() else v for k, v in network.state_dict().items()}
    save_file({k: v.contiguous().cpu() for k, v in state.items()}, partial / 'model.safetensors', {'format': 'pt'})
    for name in RUN_FILES:
        shutil.copy(folder / name, partial / name)
    write_earlier_runs(partial, [Path(path).parent for path in trainer.args.initial_checkpoint])
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    _logger.info(f'Final weights: {target / "model.safetensors"}')
