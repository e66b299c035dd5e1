"""Which module may import which: one direction through the packages, and no framework where devices have none."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / 'timm_multiexit'
# Each imports only those to its left; the root's __init__ imports up to training.
ORDER = (
    'errors files optional commands stopping datasets models pretrained inference data evaluation training __init__ '
    'cli __main__ users').split()
PURE = [p for p in sorted((PACKAGE / 'stopping').glob('*.py')) if p.stem != '__init__']
PURE += [PACKAGE / 'inference' / f'{name}.py' for name in ('batch_loop', 'device', 'images', 'traffic')]


def place(path):
    """The entry of ORDER that a file belongs to."""
    if PACKAGE not in path.parents:
        return 'users'
    return path.relative_to(PACKAGE).parts[0].removesuffix('.py')


def imports(path, source):
    """Modules of the package that a file imports, as paths from its root like ('stopping', 'costs')."""
    parent = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split('.')) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = parent[:len(parent) - node.level + 1] if node.level else ()
            base += tuple((node.module or '').split('.')) if node.module else ()
            names = [(*base, alias.name) for alias in node.names]
        else:
            continue
        for name in names:
            if name[0] == 'timm_multiexit':
                yield name[1:] if len(name) > 1 and name[1] in ORDER else ('__init__',)


def wrong_way(path, source):
    """Imports of a file against the direction; within a package there is none."""
    here = place(path)
    for name in imports(path, source):
        if name[0] != here and ORDER.index(name[0]) > ORDER.index(here):
            yield f'{path.relative_to(ROOT)} imports {".".join(name)}'
        if here == 'models' and name[0] == 'stopping' and name[1] != 'costs':
            yield f'{path.relative_to(ROOT)} imports {".".join(name)}, of stopping only costs is open to models'


def python_files():
    return [ROOT / 'train_timm.py', *(p for d in ('timm_multiexit', 'app', 'hub') for p in (ROOT / d).rglob('*.py'))]


def test_imports_run_one_way():
    wrong = [text for path in python_files() for text in wrong_way(path, path.read_text(encoding='utf-8'))]
    assert not wrong, '\n'.join(wrong)


@pytest.mark.parametrize('file, line', [
    ('stopping/policy.py', 'from ..models import MultiExitNet'),
    ('stopping/costs.py', 'from timm_multiexit.datasets import load_images'),
    ('models/_costs.py', 'from ..stopping.policy import ExitPolicy'),
    ('models/_base.py', 'def f():\n    import timm_multiexit.inference.runner'),
    ('datasets.py', 'from . import models'),
    ('errors.py', 'from .files import read_json'),
    ('evaluation/evaluate.py', 'from .. import load_model'),
    ('training/task.py', 'from ..cli import main'),
])
def test_an_import_against_the_direction_is_found(file, line):
    assert len(list(wrong_way(PACKAGE / file, line))) == 1
    assert not list(wrong_way(PACKAGE / 'cli' / '__init__.py', line))


def test_the_root_holds_packages_and_few_files():
    files = {p.name for p in PACKAGE.iterdir() if p.is_file()}
    assert files <= {'__init__.py', '__main__.py', 'commands.py', 'datasets.py', 'errors.py', 'files.py', 'optional.py',
                     'py.typed'}


BLOCKED = """
import importlib, sys, types
ALLOWED = {'numpy', 'PIL', 'timm_multiexit', *sys.stdlib_module_names}

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] not in ALLOWED:
            raise ImportError(f'{name} is not on the device')

package = types.ModuleType('timm_multiexit')  # in place of its __init__, which registers the networks
package.__path__ = [sys.argv[1]]
sys.modules['timm_multiexit'] = package
sys.meta_path.insert(0, Blocker())
"""


def test_stopping_and_the_image_reader_need_numpy_and_pillow_only(tmp_path):
    names = ['.'.join(p.relative_to(ROOT).with_suffix('').parts) for p in PURE]
    code = BLOCKED + f'''
for name in {names}:
    importlib.import_module(name)
import numpy as np
from timm_multiexit.stopping.costs import ExitCosts
from timm_multiexit.stopping.config import ExitConfig
from timm_multiexit.stopping.simulate import simulate
generator = np.random.default_rng(0)
targets = generator.integers(5, size=300)
logits = generator.normal(size=(3, 300, 5)) + 2. * np.eye(5)[targets]
config = ExitConfig.fit(logits, targets, ExitCosts((10**6, 2 * 10**6, 4 * 10**6), (1, 2, 3), (3, 32, 32)))
config.save(sys.argv[2])
policy = ExitConfig.load(sys.argv[2]).policy_for(2.5e6)
assert 2.4e6 < simulate(policy, logits, config.exit_macs).average_macs < 2.6e6
print(*sorted({{name.partition('.')[0] for name in sys.modules}} & {{'torch', 'timm', 'torchvision', 'yaml', 'tqdm'}}))
'''
    done = subprocess.run(
        [sys.executable, '-c', code, str(PACKAGE), str(tmp_path / 'multiexit.json')], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ''
