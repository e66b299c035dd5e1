"""Multi-exit image classifiers for timm; importing this package registers them in timm's model registry.

The packages, in the order of the data flow:

    models       the architectures and what their exits cost
    stopping     when to stop: policies, temperatures, what is stored with weights; arrays only, no network
    pretrained   networks, weights and their exit configs by name
    inference    engines, the early-exit and the anytime runner, the image reader
    data         labelled images: splits, and images as training and evaluation read them
    evaluation   accuracy, calibration, figures and timing
    training     what `train_timm.py` runs
    cli          the `timm-multiexit` command

`datasets` holds a record for each data set; `commands`, `errors`, `files` and `optional` serve all. Imports run one
way: see tests/test_imports.py.
"""
import importlib
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
from .stopping.monitor import ExitMonitor
from .stopping.policy import ExitPolicy

if TYPE_CHECKING:
    from .inference.profile import profile
    from .inference.programs import export_programs
    from .training.task import MultiExitTask

__version__ = '0.1.0'
__all__ = [
    'AnytimeRunner', 'EarlyExitRunner', 'ExitConfig', 'ExitCosts', 'ExitMonitor', 'ExitPolicy', 'InputError',
    'MultiExitNet', 'MultiExitTask', '__version__', 'add_exits', 'exit_costs', 'export_programs', 'list_networks',
    'load_exit_config', 'load_model', 'profile',
]


# Imported on first use: slow to import, or, as training, in need of a newer timm.
_LATER = {'MultiExitTask': '.training.task', 'export_programs': '.inference.programs', 'profile': '.inference.profile'}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(_LATER[name], __name__), name)


def __dir__() -> List[str]:
    return sorted({*globals(), *__all__})
