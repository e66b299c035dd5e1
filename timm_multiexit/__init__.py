"""Multi-exit image classifiers for timm; importing this package registers them in timm's model registry.

The packages, in the order of the data flow:

    models       the architectures and what their exits cost
    stopping     when to stop: policies, temperatures, what is stored with weights; arrays only, no network
    pretrained   networks, weights and their exit configs by name
    inference    engines, the early-exit and the anytime runner, the image reader
    evaluation   accuracy, calibration, figures and timing
    training     what `train_timm.py` runs
    cli          the `timm-multiexit` command

`datasets` holds a record for each data set; `errors`, `files` and `optional` serve all. Imports run one way: see
tests/test_imports.py.
"""
from typing import TYPE_CHECKING, Any, List

from .errors import InputError
from .inference.anytime import AnytimeRunner
from .inference.runner import EarlyExitRunner
from .models import MultiExitNet, add_exits, exit_costs
from .pretrained.exit_config import load_exit_config
from .pretrained.load import load_model
from .pretrained.names import list_networks
from .stopping.config import ExitConfig
from .stopping.costs import ExitCosts
from .stopping.policy import ExitPolicy

if TYPE_CHECKING:
    from .training.task import MultiExitTask

__version__ = '0.1.0'
__all__ = [
    'AnytimeRunner', 'EarlyExitRunner', 'ExitConfig', 'ExitCosts', 'ExitPolicy', 'InputError', 'MultiExitNet',
    'MultiExitTask', '__version__', 'add_exits', 'exit_costs', 'list_networks', 'load_exit_config', 'load_model',
]


def __getattr__(name: str) -> Any:
    """MultiExitTask is imported on first use: training needs a newer timm than inference."""
    if name != 'MultiExitTask':
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from .training.task import MultiExitTask
    return MultiExitTask


def __dir__() -> List[str]:
    return sorted({*globals(), *__all__})
