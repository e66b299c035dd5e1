"""timm's own model tests, of the installed release, on every network of this package.

The wheel lacks them, so the source archive of the same release is downloaded once and kept in .data.
"""
import fnmatch
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from xml.etree import ElementTree

import pytest
import timm
import torch
from backbone_models import BACKBONES
from conftest import PROJECT

from timm_multiexit.pretrained.names import list_networks

LARGE = [name for name in list_networks() if '_imagenet' in name]
SMALL = [*(name for name in list_networks() if name not in LARGE), *BACKBONES]
# timm skips its own densenet in the tests that script a model, by this pattern; ours is scripted below.
UNSCRIPTED = 'densenet*'
PER_NAME = """
    test_model_forward test_model_backward test_model_forward_features test_model_forward_intermediates
    test_model_forward_intermediates_features test_prune_intermediate_layers_contract test_model_forward_fx
    test_model_backward_fx
""".split()
PER_SCRIPTED_NAME = 'test_model_forward_torchscript test_model_forward_fx_torchscript'.split()
# timm tests the cfgs of transformers, by this pattern, without the shape of their features.
NON_STANDARD = 'vit_*'
PER_PRETRAINED_TAG = ['test_model_load_pretrained', 'test_model_features_pretrained']


@pytest.fixture(scope='module')
def timm_tests() -> Path:
    """timm's tests/test_models.py, in a folder of its own."""
    path = PROJECT / '.data' / f'timm-{timm.__version__}' / 'test_models.py'
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--no-binary', 'timm',
        f'timm=={timm.__version__}', '--dest', str(path.parent)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    archives = list(path.parent.glob('timm-*.tar.gz'))
    if result.returncode or not archives:
        pytest.fail(
            f'cannot download the source archive of timm {timm.__version__}, put its tests/test_models.py at {path}: '
            f'{result.stderr.strip()[-500:]}', pytrace=False)
    with tarfile.open(archives[0]) as archive:
        text = archive.extractfile(f'timm-{timm.__version__}/tests/test_models.py').read()
    part = path.with_suffix(f'.{os.getpid()}.part')
    part.write_bytes(text)
    part.replace(path)
    archives[0].unlink()
    return path


def names_with_tags(names, pretrained: bool = False):
    listed = timm.list_models(include_tags=True, pretrained=pretrained)
    return [name for name in listed if name.partition('.')[0] in names]


def expected_tests(names):
    """Every test and network that must have passed, as pytest names them: 'test[batch size-network]'."""
    scripted = [name for name in names if not fnmatch.fnmatch(name, UNSCRIPTED)]
    other = set(fnmatch.filter(names, NON_STANDARD))
    return {
        *((test, name) for test in PER_NAME for name in names),
        *((test, name) for test in PER_SCRIPTED_NAME for name in scripted),
        *(('test_model_default_cfgs' + '_non_std' * (name in other), name) for name in names_with_tags(names)),
        *((test, name) for test in PER_PRETRAINED_TAG for name in names_with_tags(names, pretrained=True)),
    } - {('test_model_forward_features', name) for name in other}


def outcomes(junit: Path):
    """{(test, network): None if it passed, else pytest's message} from a JUnit file."""
    results = {}
    for case in ElementTree.parse(junit).iter('testcase'):
        test, _, parameters = case.get('name').rstrip(']').partition('[')
        bad = [child for child in case if child.tag in ('failure', 'error', 'skipped')]
        name = parameters.split('-', 1)[1] if parameters[:1].isdigit() else parameters
        results[test, name] = f'{bad[0].tag}: {bad[0].get("message")}' if bad else None
    return results


@pytest.mark.timeout(1500)
@pytest.mark.parametrize('names', [
    pytest.param(SMALL, marks=pytest.mark.slow('4 minutes of CPU time: nine networks, and exits on four backbones'),
                 id='small'),
    pytest.param(LARGE, marks=pytest.mark.exhaustive('24 to 131 M parameters, images of 224 pixels'), id='imagenet'),
])
def test_timms_tests_pass_for_every_network(names, timm_tests, tmp_path):
    junit = tmp_path / 'junit.xml'
    path = [str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get('PYTHONPATH')])]
    environment = dict(os.environ, NETWORKS=' '.join(names), PYTHONPATH=os.pathsep.join(path))
    environment.pop('GITHUB_ACTIONS', None)  # timm runs fewer tests there
    run = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-n', '2', '-p', 'timm_plugin', '-p', 'no:cacheprovider', '-c',
         os.devnull, f'--rootdir={timm_tests.parent}', f'--junitxml={junit}', str(timm_tests)],
        cwd=timm_tests.parent, env=environment, capture_output=True, text=True)
    assert junit.is_file(), run.stdout[-2000:] + run.stderr[-2000:]
    results = outcomes(junit)
    assert {key: message for key, message in results.items() if message} == {}
    assert set(results) == expected_tests(names)
    assert run.returncode == 0, run.stdout[-2000:]


@pytest.mark.parametrize('name', fnmatch.filter([*SMALL, *LARGE], UNSCRIPTED))
def test_scripting_where_timm_skips_it(name):
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    x = torch.randn(2, *model.pretrained_cfg['input_size'])
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(model)(x), model(x))
