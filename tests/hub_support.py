"""Fixtures for the tests of hub/push.py: a small Hub on a real socket, a process with the real client, a network.

They live for the session: a process takes seconds to import torch, and building a repository draws its figures.
"""
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Queue

import pytest
import timm
import torch
import yaml
from conftest import PROJECT
from hub_server import HubServer
from safetensors.torch import save_file

from timm_multiexit.datasets import DATASETS
from timm_multiexit.evaluation.evaluate import LabelledLogits, evaluate
from timm_multiexit.files import write_json
from timm_multiexit.models._costs import exit_costs
from timm_multiexit.pretrained.record import TrainingData, config_of, describe
from timm_multiexit.stopping.config import ExitConfig
from timm_multiexit.training.history import History, Step

PUSH = PROJECT / 'hub' / 'push.py'
NAME = 'msfuse_cifar.cifar10'
REPO = f'me/{NAME}'
SHAPE = dict(steps=[1, 1, 1], base_width=8, growth=4, head_width=16)


class Client:
    """A process with the real client, see hub_client.py."""

    def __init__(self, url: str, home: Path):
        self.home = home
        self.scratch = home.parent / 'scratch.py'
        self.env = {
            **os.environ, 'HF_ENDPOINT': url, 'HF_HOME': str(home), 'HF_TOKEN': HubServer.token,
            'HF_HUB_DISABLE_XET': '1', 'HF_HUB_DISABLE_PROGRESS_BARS': '1', 'OMP_NUM_THREADS': '1'}
        self.process = subprocess.Popen(
            [sys.executable, str(PROJECT / 'tests' / 'hub_client.py')], env=self.env, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True)

    def run(self, script: Path, *args: str, **env: str) -> 'Done':
        request = dict(script=str(script), args=list(map(str, args)), env=env)
        self.process.stdin.write(json.dumps(request) + '\n')
        self.process.stdin.flush()
        return Done(**json.loads(self.process.stdout.readline()))

    def push(self, *args, **env) -> 'Done':
        return self.run(PUSH, *args, '--org', 'me', **env)

    def push_killed(self, server: HubServer, requests: int, *args: str) -> int:
        """Pushes until that many requests are answered, then kills the process with SIGKILL; returns how it ended."""
        process, left = Queue(), iter(range(requests - 1, -1, -1))

        def kill() -> None:
            if next(left, None) == 0:
                os.kill(process.get(), signal.SIGKILL)

        server.hooks[''] = kill
        request = dict(script=str(PUSH), args=[*map(str, args), '--org', 'me'], env={}, apart=True)
        self.process.stdin.write(json.dumps(request) + '\n')
        self.process.stdin.flush()
        process.put(int(self.process.stdout.readline()))
        code = int(self.process.stdout.readline())
        server.hooks.clear()
        return code

    def code(self, text: str, **env: str) -> 'Done':
        """Runs Python code; an InputError ends it like a command."""
        body = '\n'.join('    ' + line for line in text.strip().splitlines())
        self.scratch.write_text(
            f'import sys\nfrom timm_multiexit.errors import InputError\ntry:\n{body}\nexcept InputError as error:\n'
            "    sys.exit(f'error: {error}')\n")
        return self.run(self.scratch, **env)

    def load(self, place: str = f'hf-hub:{REPO}', **env: str) -> 'Done':
        return self.code(
            f"from timm_multiexit import load_model\nmodel = load_model('{place}')\n"
            "print('loaded', model.num_exits)", **env)

    def send(self, folder: Path, repo: str = REPO, repo_type: str = 'model') -> 'Done':
        """The upload of push.py, with a folder that is already built."""
        return self.code(f"""
sys.path.insert(0, '{PUSH.parent}')
from pathlib import Path
from huggingface_hub import HfApi
from upload import Target, send, verify_files
folder, target = Path('{folder}'), Target('{repo}', '{repo_type}')
commit, new = send(HfApi(), target, folder, 'again')
verify_files(HfApi(), target, folder)
print('published' if new else 'unchanged')""")

    def fresh(self, code: str, *args: str, **env: str) -> subprocess.CompletedProcess:
        """Runs Python code in a process of its own, which costs an import of torch."""
        return subprocess.run(
            [sys.executable, '-c', code, *args], env={**self.env, **env}, capture_output=True, text=True)

    def clear_cache(self) -> None:
        shutil.rmtree(self.home, ignore_errors=True)


@dataclass
class Done:
    code: int
    out: str
    err: str
    waits: list

    def ok(self) -> 'Done':
        assert self.code == 0, self.err + self.out
        return self

    def refused(self, *words: str) -> str:
        """Asserts one error line with these words, without a traceback or the token; returns it."""
        assert self.code != 0, self.out
        assert 'Traceback' not in self.err, self.err
        assert HubServer.token not in self.err + self.out
        line = next(x for x in self.err.splitlines() if 'error: ' in x)
        for word in words:
            assert word in line, f"'{word}' is not in: {self.err}"
        return line


@pytest.fixture(scope='session')
def server():
    hub = HubServer()
    yield hub
    hub.stop()


@pytest.fixture(scope='session')
def process(server, tmp_path_factory):
    client = Client(server.url, tmp_path_factory.mktemp('hub') / 'home')
    yield client
    client.process.stdin.close()
    client.process.wait(30)


@pytest.fixture
def client(process, server) -> Client:
    """The client with an empty cache, and an empty Hub."""
    server.reset()
    process.clear_cache()
    return process


@pytest.fixture(scope='session')
def final(tmp_path_factory) -> Path:
    """A small network with random weights and everything stored beside weights, made with the package's own tools."""
    folder = tmp_path_factory.mktemp('run') / 'final'
    folder.mkdir()
    torch.manual_seed(0)
    model = timm.create_model('msfuse_cifar', **SHAPE).eval()
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_file({k: v.contiguous() for k, v in state.items()}, folder / 'model.safetensors')
    classes = DATASETS['cifar10'].classes
    describe(model, TrainingData('torch/cifar10'), classes)
    write_json(folder / 'config.json', config_of(model))
    costs = exit_costs(model)
    splits = []
    for _ in range(2):
        targets = torch.randint(10, (300,))
        logits = torch.randn(3, 300, 10)
        for k in range(3):
            logits[k, torch.arange(300), targets] += 1. + k
        splits.append(LabelledLogits(logits, targets))
    validation, test = splits
    results = replace(evaluate(validation, test, costs)[0], model='msfuse_cifar', dataset='torch/cifar10')
    results.save(folder / 'results.json')
    ExitConfig.fit(validation.logits, validation.targets, costs, classes).save(folder / 'multiexit.json')
    (folder / 'recipe.yaml').write_text(yaml.safe_dump(dict(
        model='msfuse_cifar', dataset='torch/cifar10', epochs=3, opt='nmuon', lr=0.03, batch_size=256,
        initial_checkpoint='/somewhere/of/mine/start.safetensors', model_kwargs=SHAPE)))
    History([Step('mine', options={'epochs': 3})], [{'run': 'mine', 'epoch': '0', 'train_loss': '2.1'}]).write(folder)
    return folder


def copy_of(final: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(final, tmp_path / 'final'))


@pytest.fixture(scope='session')
def built(process, server, final, tmp_path_factory) -> dict:
    """The files of the repository that push.py builds from that network, by path, in memory."""
    server.reset()
    process.push(final).ok()
    return server.contents(REPO)


@pytest.fixture(scope='session')
def folder(built, tmp_path_factory) -> Path:
    """The same files in a folder."""
    return write(tmp_path_factory.mktemp('built'), built)


def write(folder: Path, files: dict) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder
