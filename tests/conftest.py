"""Fixtures, seeds and the check of skips.

Real CIFAR files lie in the folder that TIMM_MULTIEXIT_DATA names, else in .data, else torchvision downloads them.
"""
import datetime
import logging
import multiprocessing
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import timm_multiexit
from timm_multiexit.errors import InputError
from timm_multiexit.optional import require_timm

pytest.register_assert_rewrite('hub_support')
PROJECT = Path(__file__).resolve().parent.parent
# Processes that start with torch loaded. There is one server for all, so one list of what it loads.
PROCESSES = multiprocessing.get_context('spawn' if sys.platform == 'win32' else 'forkserver')
SAMPLES = PROJECT / 'timm_multiexit' / 'samples'

# Small, and still with every part of the real thing: three scales, two transitions, an exit in each block.
SMALL = dict(steps=(2, 2, 2), base_width=8, growth=4, head_width=16)
# The same for one network of each architecture.
SMALL_NETWORKS = dict(
    msfuse_cifar=SMALL,
    msdnet_cifar=SMALL,
    ranet_cifar=dict(
        scales=(1, 2, 3), block_layers=(2,) * 6, width_factors=(4, 2, 1), base_width=8, growth=4, head_width=16),
    resnet62_mc_cifar=dict(widths=(4, 8, 16), depth=4, exit_after=(2,)),
    densenet52_mc_cifar=dict(depth=4, exit_after=(2,)),
    vgg8_mc_cifar=dict(stem_width=8, widths=(8, 16, 16)),
    multiexit=dict(
        backbone='vit_tiny_patch16_224', img_size=32, patch_size=8, embed_dim=24, num_heads=3, depth=4, num_classes=10),
)
# Those for small images; exits on a timm model and the networks for ImageNet have tests of their own.
NETWORKS = [name for name in timm_multiexit.list_networks() if '_cifar' in name]

collect_ignore = ['timm_plugin.py']  # it changes timm for all who import it, as a search for doctests would
# Training and publishing need a newer timm than the rest, which is tested with the lowest one by .ci/run --lowest.
try:
    require_timm('1.0.31', 'training')
    OLD_TIMM = False
except InputError:
    OLD_TIMM = True
    collect_ignore += [
        'app/test_own_network.py', 'exhaustive', 'hub', 'hub_support.py', 'models/test_multiexit_name.py',
        'pretrained/test_record.py', 'test_backbone_journey.py', 'test_datasets.py', 'test_own_images.py', 'training']
if sys.platform != 'win32':  # an error in what is loaded ends the server
    PROCESSES.set_forkserver_preload(['timm_multiexit.cli', 'timm_multiexit.inference.predict',
                                      *([] if OLD_TIMM else ['timm_multiexit.training.run'])])


def pytest_addoption(parser):
    parser.addoption('--strict-skips', action='store_true', help='fail on a skip that tests/skips.txt does not list')
    parser.addoption('--results', metavar='FILE', help='write a table of the tests that ran, with what they measured')


def seed_everything(seed: int = 0) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def seeded():
    """Each test starts from the same random state, alone or after any other."""
    seed_everything()


@pytest.fixture(autouse=True)
def logging_as_at_start():
    """A training run sets up logging for its process, in a test or in a shared fixture: others are not to see it."""
    logging.root.setLevel(logging.WARNING)
    for handler in list(logging.root.handlers):
        if type(handler) is logging.StreamHandler:  # pytest's own are of other types
            logging.root.removeHandler(handler)


def pytest_fixture_setup(fixturedef):
    """Shared fixtures are built before `seeded` runs, in the first test that needs them: they start from it too."""
    if fixturedef.scope != 'function':
        seed_everything()


def pytest_collection_modifyitems(items):
    """A test leaves the quick tier only with its measured time as the reason."""
    for item in items:
        for tier in ('slow', 'exhaustive'):
            marker = item.get_closest_marker(tier)
            if marker and not marker.args:
                raise pytest.UsageError(f"{item.nodeid}: give the measured time, @pytest.mark.{tier}('12 s: why')")


class SkipCheck:
    """Collects skips and fails the session on those that tests/skips.txt does not list."""

    def __init__(self):
        lines = (PROJECT / 'tests' / 'skips.txt').read_text().splitlines()
        self.accepted = [line.split('  # ')[0].strip() for line in lines if line and not line.startswith('#')]
        self.unexpected = []

    def note(self, report) -> None:
        if report.skipped and not hasattr(report, 'wasxfail'):
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            skip = f'{report.nodeid}: {reason.removeprefix("Skipped: ")}'
            if not any(re.search(pattern, skip) for pattern in self.accepted):
                self.unexpected.append(skip)

    pytest_runtest_logreport = pytest_collectreport = note

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session):
        if self.unexpected and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        for skip in self.unexpected:
            terminalreporter.write_line(f'UNLISTED SKIP {skip}: mend it, or list it in tests/skips.txt', red=True)


class ResultsTable:
    """Keeps a Markdown table: each test with its outcome, duration and the property `measured` that it recorded.

    A row is written as soon as its test ends and replaces that of an earlier run, so a long tier may run in parts.
    """

    HEAD = ['| test | outcome | time | date | commit | measured |', '|---|---|---|---|---|---|']

    def __init__(self, path: str):
        self.path = Path(path).resolve()  # tests change the folder
        self.commit = subprocess.run(
            ['git', 'rev-parse', '--short', 'HEAD'], cwd=PROJECT, capture_output=True, text=True).stdout.strip()

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == 'call' or report.outcome != 'passed':
            measured = dict(report.user_properties).get('measured', '')
            test = report.nodeid.removeprefix('tests/')
            rows = {}
            if self.path.is_file():
                for line in self.path.read_text(encoding='utf-8').splitlines()[len(self.HEAD):]:
                    rows[line.split(' | ')[0]] = line
            rows[f'| {test}'] = (f'| {test} | {report.outcome} | {report.duration:.0f} s | {datetime.date.today()} | '
                                 f'{self.commit or "unknown"} | {measured} |')
            self.path.write_text('\n'.join([*self.HEAD, *sorted(rows.values())]) + '\n', encoding='utf-8')


def pytest_configure(config):
    if config.getoption('--results') and not hasattr(config, 'workerinput'):
        config.pluginmanager.register(ResultsTable(config.getoption('--results')))
    # Reports of all workers reach the controller; a worker does not judge.
    if config.getoption('--strict-skips') and not hasattr(config, 'workerinput'):
        config.pluginmanager.register(SkipCheck())


@pytest.fixture(scope='session')
def cifar_root() -> str:
    """Folder with cifar-10-batches-py and cifar-100-python, as torchvision reads them."""
    from torchvision.datasets import CIFAR10, CIFAR100
    root = os.environ.get('TIMM_MULTIEXIT_DATA') or str(PROJECT / '.data')
    for dataset in (CIFAR10, CIFAR100):
        try:
            dataset(root, download=False)
        except RuntimeError:
            if 'TIMM_MULTIEXIT_DATA' in os.environ:
                raise
            try:
                dataset(root, download=True)
            except OSError as error:
                pytest.skip(f'CIFAR is not in {root} and cannot be downloaded ({error}); set TIMM_MULTIEXIT_DATA')
    return root


@pytest.fixture
def small_msfuse():
    """A small MSFuse with fixed random weights, in eval mode."""
    torch.manual_seed(0)
    return timm.create_model('msfuse_cifar', **SMALL).eval()


def calibrated_network():
    """A small MSFuse in eval mode, with an exit config of noisy logits."""
    torch.manual_seed(0)
    model = timm.create_model('msfuse_cifar', **SMALL).eval()
    targets = torch.randint(10, (300,))
    logits = torch.randn(3, 300, 10) + 2. * torch.eye(10)[targets]
    return model, timm_multiexit.ExitConfig.fit(
        logits, targets, timm_multiexit.exit_costs(model), [f'k{k}' for k in range(10)])


@pytest.fixture(scope='session')
def exported(tmp_path_factory):
    """That network as a folder for devices; tests leave it as it is."""
    from timm_multiexit.inference.export import export_folder  # needs an extra
    place = tmp_path_factory.mktemp('export') / 'device'
    export_folder(*calibrated_network(), place)
    return place


def save_noise(path, rng):
    """Writes a smooth random image of 32 x 32 pixels."""
    small = rng.integers(256, size=(8, 8, 3), dtype=np.uint8)
    Image.fromarray(small).resize((32, 32), Image.Resampling.BICUBIC).save(path)


@pytest.fixture(params=NETWORKS)
def network(request):
    """Every registered network of the package, with fixed random weights, in eval mode."""
    torch.manual_seed(0)
    return timm.create_model(request.param).eval()


@pytest.fixture(scope='module')
def one_thread():
    """These networks and batches are small: PyTorch's threads would spend their time waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def exit_logits(engine, images):
    """Logits of every exit, stage by stage."""
    with torch.inference_mode():
        state, logits = engine.start(images), []
        for k in range(engine.num_exits):
            state, x = engine.run(k, k, state)
            logits.append(torch.from_numpy(x))
    return logits
