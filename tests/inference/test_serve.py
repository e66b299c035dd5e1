"""The HTTP server of an exported folder: answers, batches of many callers, limits, and an end."""
import asyncio
import concurrent.futures
import io
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from conftest import PROJECT, save_noise
from PIL import Image

pytest.importorskip('onnxruntime')

from fastapi import HTTPException  # noqa: E402

from timm_multiexit.cli import main  # noqa: E402
from timm_multiexit.errors import InputError  # noqa: E402
from timm_multiexit.inference.batch_loop import run_one, segments_of  # noqa: E402
from timm_multiexit.inference.device import FolderEngine, classify  # noqa: E402
from timm_multiexit.inference.export import export_folder  # noqa: E402
from timm_multiexit.inference.segment_queues import QueueFull, SegmentQueues  # noqa: E402
from timm_multiexit.inference.server import MAX_BODIES, Guard  # noqa: E402
from timm_multiexit.stopping.config import ExitConfig  # noqa: E402
from timm_multiexit.stopping.policy import Decision, ExitPolicy  # noqa: E402

COMMAND = [sys.executable, '-c', 'import sys; from timm_multiexit.cli import main; sys.exit(main())', 'serve']


@pytest.fixture(scope='module')
def folder(exported):
    return exported


@pytest.fixture(scope='module')
def config(folder):
    return ExitConfig.load(folder / 'multiexit.json')


@pytest.fixture(scope='module')
def policy(folder, config):
    """Thresholds at which images of noise leave at every exit."""
    engine, x = FolderEngine(folder), np.random.default_rng(1).normal(size=(60, 3, 32, 32)).astype(np.float32)
    state, thresholds = engine.start(x), []
    for k in range(2):
        state, logits = engine.run(k, k, state)
        whole = ExitPolicy.at_exit(k, 3, config.temperatures)
        thresholds.append(float(np.log(1 / (1 / np.median(whole.decide(k, logits).confidence) - 1))))
    return ExitPolicy((*thresholds, -1e9), config.temperatures)


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    place, rng = tmp_path_factory.mktemp('photos'), np.random.default_rng(0)
    for i in range(40):
        save_noise(place / f'{i:02}.png', rng)
    return sorted(place.iterdir())


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


class Server:
    """`timm-multiexit serve` in a process of its own."""

    def __init__(self, folder: Path, *options: object, seconds: int = 60):
        port = free_port()
        self.url = f'http://127.0.0.1:{port}'
        self.process = subprocess.Popen(
            [*COMMAND, str(folder), '--port', str(port), *map(str, options)],
            cwd=PROJECT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(10 * seconds):
            try:
                self.get('/health')
                return
            except OSError:
                assert self.process.poll() is None, self.process.stderr.read()
                time.sleep(0.1)
        raise AssertionError('the server does not answer')

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return answer.read().decode()

    def post(self, body, kind='image/png'):
        request = urllib.request.Request(self.url + '/classify', body, {'Content-Type': kind})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def post_form(self, files):
        parts = b''.join(
            b'--line\r\nContent-Disposition: form-data; name="image"; filename="%s"\r\n\r\n%s\r\n' % (name, data)
            for name, data in files)
        return self.post(parts + b'--line--\r\n', 'multipart/form-data; boundary=line')


@pytest.fixture(scope='module')
def server(folder):
    server = Server(folder, '--confidence', 0.3, '--max-bytes', 200_000, '--queue', 64)
    yield server
    images = json.loads(server.get('/health'))['images']
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(15) in (0, -signal.SIGTERM)
    errors = server.process.stderr.read()
    assert 'Traceback' not in errors
    assert ('by chance that has probability' in errors) == (images >= 100)  # the monitor's; these images are noise


@pytest.fixture(scope='module')
def expected(folder, config, photos):
    policy = ExitPolicy.at_confidence(0.3, config.temperatures)
    answers = list(classify(FolderEngine(folder), config, policy, photos, 1))
    assert len({a['exit'] for a in answers}) > 1
    return answers


def same(ours, theirs):
    assert {**ours, 'image': '', 'probability': 0.} == {**theirs, 'image': '', 'probability': 0.}
    assert ours['probability'] == pytest.approx(theirs['probability'], abs=1e-5)


def test_answers_one_by_one_in_a_form_and_from_many_callers(server, photos, expected):
    for path, answer in list(zip(photos, expected))[:5]:
        status, ours = server.post(path.read_bytes())
        assert status == 200
        same(ours, answer)
    status, ours = server.post_form([(p.name.encode(), p.read_bytes()) for p in photos] + [(b'text', b'no image')])
    assert status == 200 and [a['image'] for a in ours] == [*(p.name for p in photos), 'text']
    assert 'not an image' in ours.pop()['error']
    for a, b in zip(ours, expected):
        same(a, b)
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        for (status, ours), answer in zip(pool.map(lambda p: server.post(p.read_bytes()), photos * 3), expected * 3):
            assert status == 200
            same(ours, answer)


def test_what_is_refused_and_that_numbers_add_up(server, config, photos):
    buffer = io.BytesIO()
    Image.new('1', (9000, 9000)).save(buffer, 'PNG')
    animation, counts = io.BytesIO(), {}
    Image.new('RGB', (8, 8)).save(animation, 'GIF', save_all=True, append_images=[Image.new('RGB', (8, 8), 'red')])
    for body, status, words in [
            (b'', 422, 'not an image'), (b'no image', 422, 'not an image'), (photos[0].read_bytes()[:60], 422, 'image'),
            (buffer.getvalue(), 422, '81 million pixels'), (bytes(300_000), 413, 'more than 200,000 bytes'),
            (animation.getvalue()[:58], 422, 'image'), (b'%!PS-Adobe-3.0 EPSF-3.0\n', 422, 'send JPEG')]:
        found, answer = server.post(body)
        assert found == status and words in answer['detail'] and '\n' not in answer['detail']
    assert server.post_form([])[0] == 422
    status, answer = server.post_form([(b'a', photos[0].read_bytes()[:90])] * 64 + [(b'b', b'')])
    assert status == 400 and '\n' not in answer['detail']
    assert server.post(photos[0].read_bytes())[0] == 200
    for line in server.get('/metrics').splitlines():
        if not line.startswith('#'):
            name, value = line.rsplit(' ', 1)
            counts[name] = float(value)
    images = [counts[f'multiexit_images_total{{exit="{k}"}}'] for k in (1, 2, 3)]
    assert sum(images) == counts['multiexit_seconds_count'] == json.loads(server.get('/health'))['images'] > 0
    assert counts['multiexit_requests_total{status="422"}'] == 7
    assert counts['multiexit_requests_total{status="413"}'] == 1
    assert counts['multiexit_requests_total{status="200"}'] > 0
    assert counts['multiexit_macs_total'] == np.dot(images, config.exit_macs)
    assert counts['multiexit_waiting_images'] == 0


def test_more_images_than_the_queue_holds_are_refused(server):
    buffer = io.BytesIO()
    Image.new('1', (1500, 1500)).save(buffer, 'PNG')  # small to send, slow to decode
    form = [(b'a', buffer.getvalue())] * 40
    before = json.loads(server.get('/health'))['images']
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: server.post_form(form), range(6)))
    full = [answer for status, answer in found if status == 503]
    assert full and all('images wait: try again later' in answer['detail'] for answer in full)
    answered = [answer for status, answer in found if status == 200]
    assert len(answered) + len(full) == 6 and all(len(answer) == 40 for answer in answered)
    # Of a request that is refused, nothing runs.
    assert json.loads(server.get('/health')) == dict(status='ok', images=before + 40 * len(answered), waiting=0)


def test_an_upload_that_is_large_stalls_or_breaks_off_does_no_harm(folder):
    server = Server(folder)
    assert server.post(bytes(60_000_000))[0] == 413  # more than the sockets hold: its caller still sends
    head = b'POST /classify HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: 5000\r\n\r\nabc'
    address = ('127.0.0.1', int(server.url.rsplit(':', 1)[1]))
    for _ in range(3):
        with socket.create_connection(address) as caller:
            caller.sendall(head)
    with socket.create_connection(address) as caller:
        caller.sendall(head)
        time.sleep(0.3)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(9) in (0, -signal.SIGTERM)
        assert b'503' in caller.recv(1000)
    assert 'Traceback' not in server.process.stderr.read()


def test_images_of_all_exits_keep_their_answers_in_batches(folder, policy):
    engine = FolderEngine(folder)
    queues = SegmentQueues(engine, policy, batch_size=7)
    images = np.random.default_rng(1).normal(size=(60, 3, 32, 32)).astype(np.float32)
    found = [future.result(30) for future in [queues.submit(image) for image in images]]
    segments = segments_of(policy)
    for image, answer in zip(images, found):
        alone = run_one(engine, policy, segments, image[None])
        assert answer.exit_index == alone.exit_index and answer.prediction == alone.prediction
        np.testing.assert_allclose(answer.logits, alone.logits, atol=1e-4)
    assert {int(a.exit_index[0]) for a in found} == {0, 1, 2} and queues.images == 0
    queues.close()


def test_what_waits_when_the_server_ends_is_not_run(folder, policy):
    queues = SegmentQueues(FolderEngine(folder), policy, batch_size=1)
    go, real, ran = threading.Event(), queues.engine.run, []
    queues.engine.run = lambda *args: go.wait() and (ran.append(1), real(*args))[1]
    waiting = [queues.submit(np.zeros((3, 32, 32), np.float32)) for _ in range(20)]
    threading.Timer(0.3, go.set).start()
    queues.close()
    assert len(ran) <= 2 and all(future.done() for future in waiting)
    with pytest.raises(RuntimeError, match='the server is stopping'):
        waiting[-1].result()


def test_bodies_held_at_once_are_limited():
    status = []

    async def caller(guard, size, go):
        async def receive():
            return dict(type='http.request', body=bytes(size), more_body=False)

        async def send(message):
            status.append(message.get('status'))

        async def app(scope, receive, send):
            try:
                await receive()
            except HTTPException as error:
                await send(dict(type='http.response.start', status=error.status_code))
                return
            await go.wait()
            await send(dict(type='http.response.start', status=200))
        guard.app = app
        await guard(dict(type='http', path='/'), receive, send)

    async def run():
        guard, go = Guard(None, 1000, None), asyncio.Event()
        callers = [asyncio.create_task(caller(guard, 1000, go)) for _ in range(MAX_BODIES + 1)]
        await asyncio.sleep(0.1)
        assert status == [503]
        go.set()
        await asyncio.gather(*callers)
        assert status == [503] + [200] * MAX_BODIES and guard.held == 0
    asyncio.run(run())


def test_places_are_limited(folder, policy):
    queues = SegmentQueues(FolderEngine(folder), policy, limit=3)
    with queues.places(2):
        with pytest.raises(QueueFull, match='2 images wait: try again later'), queues.places(2):
            pass
        with queues.places(1):
            assert queues.images == 3
    assert queues.images == 0
    with pytest.raises(InputError, match='send at most 3'), queues.places(4):
        pass
    queues.close()


def test_errors_and_cancelled_callers_do_not_reach_others(folder, policy):
    queues = SegmentQueues(FolderEngine(folder), policy)
    image, go = np.zeros((3, 32, 32), np.float32), threading.Event()
    real = queues.engine.run
    queues.engine.run = lambda *args: go.wait() and real(*args)  # as slow as wanted
    waiting = [queues.submit(image) for _ in range(8)]
    waiting[4].cancel()
    go.set()
    assert all(len(future.result(30).logits) == 1 for future in waiting[:4] + waiting[5:])
    bad = queues.submit(np.full((3, 32, 32), np.nan, np.float32))
    with pytest.raises(InputError):
        bad.result(30)
    assert queues.submit(image).result(30).exit_index >= 0  # the worker goes on
    queues.close()


def test_a_rule_with_memory_keeps_it_with_its_image(folder):
    class Second:
        """Leaves at exit 3 what had a large first logit at exit 1, else at exit 2."""

        num_exits, exits_in_use = 3, (0, 1, 2)

        def decide(self, k, logits, memory=None):
            memory = logits[:, 0] > middle if memory is None else memory
            return Decision(logits.max(1), np.full(len(logits), k == 2) | ((k == 1) & ~memory), memory)

    engine = FolderEngine(folder)
    images = np.random.default_rng(2).normal(size=(40, 3, 32, 32)).astype(np.float32)
    first = engine.run(0, 0, engine.start(images))[1][:, 0]
    middle = float(np.sort(first)[19:21].mean())
    queues = SegmentQueues(engine, Second(), batch_size=8)
    found = [f.result(30) for f in [queues.submit(image) for image in images]]
    assert [int(a.exit_index[0]) for a in found] == [2 if large else 1 for large in first > middle]
    queues.close()


def test_a_server_that_cannot_start_says_why(tmp_path, folder, capsys):
    with socket.create_server(('127.0.0.1', 0)) as other:
        taken = other.getsockname()[1]
        for options in ([tmp_path], [folder, '--max-loss', '1'], [folder, '--average-budget', '1k'],
                        [folder, '--port', taken], [folder, '--host', 'nowhere.invalid']):
            assert main(['serve', *map(str, options)]) == 2
            out, err = capsys.readouterr()
            assert not out and err.count('\n') == 1


def processor_seconds(pid):
    """Of a process so far. Callers share this machine's cores, so images/s alone hides what the server saves."""
    fields = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')


@pytest.mark.exhaustive('four minutes: 50 callers for two, with early exits and without')
def test_fifty_callers(tmp_path, cifar_root, record_property):
    """No answer is another's, memory stays flat, and what early exit gains under load."""
    from timm_multiexit import load_exit_config, load_model
    from timm_multiexit.data.splits import open_splits
    name, measured = 'msfuse_cifar.cifar10', []
    export_folder(load_model(name), load_exit_config(name), tmp_path / 'device')
    config, paths = ExitConfig.load(tmp_path / 'device' / 'multiexit.json'), []
    for i, pixels in enumerate(open_splits('torch/cifar10', cifar_root).test.pixels[:500]):
        paths.append(tmp_path / f'{i:03}.png')
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(paths[-1])
    bodies = [path.read_bytes() for path in paths]
    for options, rule in [(['--average-budget', '20M'], config.policy_for('20M')),
                          ([], ExitPolicy.at_exit(6, 7, config.temperatures))]:
        expected = list(classify(FolderEngine(tmp_path / 'device'), config, rule, paths, 32))
        server = Server(tmp_path / 'device', *options)
        before = processor_seconds(server.process.pid)
        end, memory, times = time.monotonic() + 60, [], [[] for _ in range(50)]

        def call(number, server=server, end=end, expected=expected, times=times):
            i, wrong = number * 10, 0
            while time.monotonic() < end:
                start = time.monotonic()
                status, answer = server.post(bodies[i % 500])
                times[number].append(time.monotonic() - start)
                wrong += status != 200 or (answer['label'], answer['exit']) != (
                    expected[i % 500]['label'], expected[i % 500]['exit'])
                i += 1
            return wrong

        with concurrent.futures.ThreadPoolExecutor(50) as pool:
            calls = [pool.submit(call, number) for number in range(50)]
            while time.monotonic() < end:
                status = Path(f'/proc/{server.process.pid}/status').read_text()
                memory.append(int(status.split('VmRSS:')[1].split()[0]) / 1024)
                time.sleep(5)
            wrong = sum(c.result() for c in calls)
        used = processor_seconds(server.process.pid) - before
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) in (0, -signal.SIGTERM)
        spent = sorted(t for own in times for t in own)
        measured.append(
            f"{' '.join(options) or 'the full network'}: {len(spent) / 60:.0f} images/s, "
            f'{1e3 * used / len(spent):.1f} ms of processor time an image in the server, p50 '
            f'{1e3 * statistics.median(spent):.0f} ms, p95 {1e3 * spent[int(0.95 * len(spent))]:.0f} ms, '
            f'{memory[len(memory) // 2]:.0f} to {memory[-1]:.0f} MB, {wrong} of {len(spent)} answers wrong')
        assert wrong <= len(spent) / 1000  # an image within rounding of a threshold
        assert memory[-1] < 1.03 * memory[len(memory) // 2]
    record_property('measured', '; '.join(measured))
