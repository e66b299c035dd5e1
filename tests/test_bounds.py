"""The lower bounds in pyproject.toml are the versions that .ci/run --lowest installs and tests."""
import re
import sys

import pytest
from conftest import PROJECT

tomllib = pytest.importorskip('tomllib' if sys.version_info >= (3, 11) else 'tomli')  # pytest brings tomli


def test_lower_bounds_are_the_tested_versions():
    project = tomllib.loads((PROJECT / 'pyproject.toml').read_text(encoding='utf-8'))['project']
    required = project['dependencies'] + sum(project['optional-dependencies'].values(), [])
    bounds = dict(re.match(r'([\w-]+)>=([\d.]+)', r).groups() for r in required if 'timm-multiexit' not in r)
    lines = (PROJECT / '.ci' / 'lowest.txt').read_text(encoding='utf-8').splitlines()
    assert bounds == dict(line.split('==') for line in lines if not line.startswith('#'))
