"""pytest plugin: makes timm's own tests/test_models.py run over networks of this package, and over nothing else.

Load it with `-p timm_plugin`, this folder on the path and the names in the variable NETWORKS. timm's test file asks
`timm.list_models` for names when it is imported; the plugin is imported before.
"""
import os
from functools import wraps

import backbone_models  # noqa: F401 - registers exits on three kinds of timm's models
import pytest
import timm

import timm_multiexit  # noqa: F401 - registers the package's networks

_NAMES = frozenset(os.environ['NETWORKS'].split())


def is_ours(name) -> bool:
    """Whether a name, with or without tag, is of a network to be tested."""
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
