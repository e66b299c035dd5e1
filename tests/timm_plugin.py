"""pytest plugin: makes timm's own tests/test_models.py run over this package's networks, and over nothing else.

Load it with `-p timm_plugin`, this folder on the path. timm's test file asks `timm.list_models` for the names when it
is imported; the plugin is imported before.
"""
from functools import wraps

import pytest
import timm
from backbone_models import BACKBONES  # registers exits on three kinds of timm's models

from timm_multiexit.pretrained.names import list_networks

_NAMES = frozenset([*list_networks(), *BACKBONES])


def is_ours(name) -> bool:
    """Whether a name, with or without tag, is one of this package's networks."""
    return isinstance(name, str) and name.split('.', 1)[0] in _NAMES


def only_ours(listing):
    """timm's listing function, less everybody else's names.

    `module` is ignored: timm's tests choose by it the modules whose models have some method, and ours have them all.
    """
    @wraps(listing)
    def wrapped(*args, module='', **kwargs):
        return [name for name in listing(*args, **kwargs) if is_ours(name)]
    return wrapped


timm.list_models = only_ours(timm.list_models)
timm.list_pretrained = only_ours(timm.list_pretrained)


def pytest_configure(config):
    for marker in 'base forward backward cfg cfg_nonstd torchscript features fxforward fxbackward'.split():
        config.addinivalue_line('markers', f'{marker}: a group of timm\'s tests')


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Deselects the tests of timm's own models, and those with no model at all."""
    ours = [item for item in items if hasattr(item, 'callspec') and is_ours(item.callspec.params.get('model_name'))]
    config.hook.pytest_deselected(items=[item for item in items if item not in ours])
    items[:] = ours
