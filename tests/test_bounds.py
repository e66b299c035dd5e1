"""The lower bounds in pyproject.toml are the versions that .ci/run --lowest installs and tests."""
import re
import sys

import pytest
from conftest import PROJECT

tomllib = pytest.importorskip('tomllib' if sys.version_info >= (3, 11) else 'tomli')  # pytest brings tomli


def bounds(requirements):
    named = [r for r in requirements if not r.startswith('timm-multiexit')]
    return dict(re.match(r'([\w-]+)(?:\[[\w,]+\])?>=([\d.]+)', r).groups() for r in named)


def pinned(name):
    lines = (PROJECT / '.ci' / name).read_text(encoding='utf-8').splitlines()
    return dict(line.split('==') for line in lines if not line.startswith('#'))


def test_lower_bounds_are_the_tested_versions():
    project = tomllib.loads((PROJECT / 'pyproject.toml').read_text(encoding='utf-8'))['project']
    extras = project['optional-dependencies']
    export = bounds(extras.pop('export'))
    extras.pop('ray')  # its newest needs a newer Starlette than the oldest Gradio takes: tested beside the newest only
    assert bounds(project['dependencies'] + sum(extras.values(), [])) == pinned('lowest.txt')
    assert export.items() <= pinned('lowest-export.txt').items()
