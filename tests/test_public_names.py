"""The names that users may rely on, and nothing more: CONTRIBUTING.md says what is stable."""
import pytest
from conftest import OLD_TIMM

import timm_multiexit

NAMES = """
    AnytimeRunner EarlyExitRunner ExitConfig ExitCosts ExitMonitor ExitPolicy InputError MultiExitNet MultiExitTask
    __version__ add_exits exit_costs export_programs list_networks load_exit_config load_model profile
""".split()


def test_public_names():
    assert sorted(timm_multiexit.__all__) == sorted(NAMES)
    assert set(NAMES) <= set(dir(timm_multiexit))
    for name in NAMES:
        if OLD_TIMM and name == 'MultiExitTask':
            with pytest.raises(timm_multiexit.InputError, match='training needs timm 1.0.31 or newer'):
                getattr(timm_multiexit, name)
        else:
            assert getattr(timm_multiexit, name) is not None
