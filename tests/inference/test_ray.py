"""`--ray` of serve and predict: the answers of one process, from several, and none of these left."""
import concurrent.futures
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import PROJECT, save_noise
from test_predict import rows_of
from test_serve import Server, same

from timm_multiexit.cli import main
from timm_multiexit.errors import InputError
from timm_multiexit.inference.batch_loop import Answers, run_one, segments_of
from timm_multiexit.inference.device import FolderEngine, classify
from timm_multiexit.inference.segment_queues import Waiting
from timm_multiexit.optional import missing_packages
from timm_multiexit.stopping.config import ExitConfig
from timm_multiexit.stopping.policy import Decision, ExitPolicy

pytestmark = pytest.mark.skipif(bool(missing_packages('ray')), reason='could not import ray')
DAMAGED = (4, 7)


@pytest.fixture(scope='module')
def folder(exported):
    return exported


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    """Ten files, two of them damaged."""
    place, rng = tmp_path_factory.mktemp('photos'), np.random.default_rng(0)
    for i in range(10):
        save_noise(place / f'{i}.png', rng)
    paths = sorted(place.iterdir())
    for i in DAMAGED:
        paths[i].write_bytes(paths[i].read_bytes()[:300 * (i - 4)])
    return paths


class Remembering:
    """Leaves at exit 3 what had a large first logit at exit 1, else at exit 2."""

    num_exits, exits_in_use = 3, (0, 1, 2)

    def __init__(self, middle):
        self.middle = middle

    def decide(self, k, logits, memory=None):
        memory = logits[:, 0] > self.middle if memory is None else memory
        return Decision(logits.max(1), np.full(len(logits), k == 2) | ((k == 1) & ~memory), memory)


@pytest.mark.parametrize('groups', [1, 2, 3])
def test_deployments_in_a_chain_give_the_answers_of_one_loop(folder, groups):
    from timm_multiexit.inference.on_ray import Segments  # seconds, which every collection of tests would take
    engine, images = FolderEngine(folder), np.random.default_rng(2).normal(size=(12, 3, 32, 32)).astype(np.float32)
    rule = Remembering(np.sort(engine.run(0, 0, engine.start(images))[1][:, 0])[5:7].mean())
    found = [Waiting(engine.start(image[None])) for image in images]
    for part in np.array_split(segments_of(rule), groups):
        deployment = Segments(folder, engine.graphs, rule, part.tolist(), 8, None)
        staying = [i for i, result in enumerate(found) if isinstance(result, Waiting)]
        for i, result in zip(staying, deployment._run([found[i] for i in staying])):
            assert isinstance(result, Answers) or all(len(x) == 1 for x in result.state)  # no other image is sent
            found[i] = result
    for image, answer in zip(images, found):
        alone = run_one(engine, rule, segments_of(rule), image[None])
        assert answer.exit_index == alone.exit_index and answer.prediction == alone.prediction
        np.testing.assert_allclose(answer.logits, alone.logits, atol=1e-4)
    assert {int(answer.exit_index[0]) for answer in found} == {1, 2}


def test_replicas_that_cannot_be(folder, capsys):
    from timm_multiexit.inference.on_ray import RayQueues
    with pytest.raises(InputError, match='the policy has 1 segments: give --replicas no more numbers than that'):
        RayQueues(FolderEngine(folder), ExitPolicy.at_exit(2, 3, (1., 1., 1.)), [1, 1], 32, 64, 'name')
    assert main(['serve', str(folder), '--replicas', '2']) == 2
    assert capsys.readouterr().err == 'timm-multiexit: error: --replicas goes with --ray\n'
    with pytest.raises(SystemExit):
        main(['serve', str(folder), '--ray', '--replicas', '2,0'])
    assert "'0' is not an integer from 1" in capsys.readouterr().err


def descendants(pid):
    parents = {}
    for path in Path('/proc').glob('[0-9]*/stat'):
        try:
            state, parent = path.read_text().rpartition(')')[2].split()[:2]
        except OSError:
            continue
        if state != 'Z':
            parents[int(path.parent.name)] = int(parent)
    found, new = set(), {pid}
    while new:
        found |= new
        new = {child for child, parent in parents.items() if parent in found} - found
    return found - {pid}


def left_of(pids):
    """Those that still run, after up to a minute."""
    for _ in range(600):
        left = [pid for pid in pids if Path(f'/proc/{pid}/exe').exists()]
        if not left:
            break
        time.sleep(0.1)
    return left


@pytest.mark.exhaustive('40 to 70 s each: starts Ray, which gives up on cores that are busy for 30 s')
@pytest.mark.parametrize('options', [(), ('--replicas', '1,1')])
def test_serve(folder, photos, options):
    config = ExitConfig.load(folder / 'multiexit.json')
    policy = ExitPolicy.at_confidence(0.3, config.temperatures)
    expected = list(classify(FolderEngine(folder), config, policy, photos, 1))
    assert len({answer['exit'] for answer in expected if 'exit' in answer}) > 1
    server = Server(folder, '--confidence', 0.3, '--max-bytes', 200_000, '--queue', 20, '--ray', *options, seconds=300)
    processes = descendants(server.process.pid)
    assert len(processes) > 4
    for path, answer in zip(photos, expected):
        status, ours = server.post(path.read_bytes())
        assert status == (422 if 'error' in answer else 200)
        if status == 200:
            same(ours, answer)
    form = [(path.name.encode(), path.read_bytes()) for path in photos]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: server.post_form(form), range(8)))
    assert {status for status, _ in found} == {200, 503}  # more than the queue holds
    for _, ours in [pair for pair in found if pair[0] == 200]:
        for a, b in zip(ours, expected):
            assert ('error' in a) == ('error' in b)
            if 'error' not in a:
                same(a, b)
    assert server.post(bytes(300_000))[0] == 413
    answered = 8 * (1 + sum(status == 200 for status, _ in found))
    assert json.loads(server.get('/health')) == dict(status='ok', images=answered, waiting=0)
    assert f'multiexit_seconds_count {answered:.1f}' in server.get('/metrics')
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0
    assert server.process.stderr.read() == ''
    assert not left_of(processes)


@pytest.mark.exhaustive('65 s: starts Ray twice')
def test_predict_killed_goes_on(folder, photos, tmp_path, monkeypatch):
    """With relative paths, and the rows of one process."""
    monkeypatch.chdir(tmp_path)
    place = Path('images')
    place.mkdir()
    for i in range(1500):
        os.link(photos[i % 10], place / f'{i:04}.png')
    command = ['predict', str(folder), str(place), '--confidence', '0.3', '--part-size', '40', '--output']
    assert main([*command, 'alone']) == 0
    code = 'import sys; from timm_multiexit.cli import main; sys.exit(main())'
    with subprocess.Popen([sys.executable, '-c', code, *command, 'out', '--ray'],
                          env=dict(os.environ, PYTHONPATH=str(PROJECT))) as process:
        while not list(Path('out').glob('part-*.parquet')):
            assert process.poll() is None
            time.sleep(0.01)
        names = {pid: Path(f'/proc/{pid}/cmdline').read_bytes() for pid in descendants(process.pid)}
        workers = [pid for pid, name in names.items() if name.startswith(b'ray::') and b'Agent' not in name]
        process.kill()  # Ray's agents, which write nothing of ours, take a minute to notice
    assert workers and not left_of(workers)
    before = len(list(Path('out').glob('part-*.parquet')))
    assert 0 < before < 38
    done = subprocess.run([sys.executable, '-c', code, *command, 'out', '--ray'], capture_output=True, text=True,
                          env=dict(os.environ, PYTHONPATH=str(PROJECT)))
    assert done.returncode == 0 and '1,500 images in 38 parts, 300 of them with an error' in done.stdout
    assert [line for line in done.stderr.splitlines() if 'image/s' not in line] == []
    assert rows_of(Path('out')) == rows_of(Path('alone'))
