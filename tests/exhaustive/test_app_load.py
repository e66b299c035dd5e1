"""The app under load: fifty callers at once for two minutes, good and bad calls mixed; then strangers who attack it."""
import contextlib
import io
import itertools
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
from conftest import PROJECT, SAMPLES
from PIL import Image

pytest.importorskip('gradio', reason="the app needs gradio: pip install 'timm-multiexit[app]'")

import httpx  # noqa: E402 - comes with gradio
from served import available_networks  # noqa: E402

CLIENTS, SECONDS = 50, 120
SETTINGS = [('', None), ('30M', None), ('', 0.5), ('', 0.9)]  # budget and confidence


class App:
    """app.py in a process of its own."""

    def __init__(self, folder: Path):
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = free.getsockname()[1]
        self.url, log = f'http://127.0.0.1:{port}', folder / 'app.log'
        environment = dict(os.environ, OMP_NUM_THREADS='1', GRADIO_TEMP_DIR=str(folder), HF_HUB_OFFLINE='1')
        with log.open('w') as file:
            self.process = subprocess.Popen(
                [sys.executable, str(PROJECT / 'app' / 'app.py'), '--port', str(port)], stdout=file, stderr=file,
                env=environment)
        for _ in range(600):
            try:
                httpx.get(self.url).raise_for_status()
                return
            except httpx.TransportError:
                assert self.process.poll() is None, log.read_text()
                time.sleep(0.5)
        raise AssertionError('the app does not answer: ' + log.read_text())

    def memory(self) -> float:
        """Resident memory in MB."""
        return int(Path(f'/proc/{self.process.pid}/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 2**20

    def cpu(self) -> float:
        """CPU time so far in seconds."""
        ticks = Path(f'/proc/{self.process.pid}/stat').read_text().rpartition(')')[2].split()[11:13]
        return sum(map(int, ticks)) / os.sysconf('SC_CLK_TCK')


class Caller:
    """Calls the API over plain HTTP, within a session as Gradio's own client and the page do."""

    def __init__(self, app: App):
        self.http = httpx.Client(base_url=f'{app.url}/gradio_api', timeout=180.)
        self.session = uuid.uuid4().hex

    def upload(self, data: bytes) -> dict:
        """A file as an argument of a call."""
        sent = self.http.post('/upload', files={'files': ('image.png', data, 'image/png')}).raise_for_status()
        return {'path': sent.json()[0], 'meta': {'_type': 'gradio.FileData'}}

    def classify(self, *arguments: object) -> dict:
        """The answer, or {'error': message}."""
        body = {'data': arguments, 'session_hash': self.session}
        sent = self.http.post('/call/classify', json=body).raise_for_status()
        with self.http.stream('GET', f'/call/classify/{sent.json()["event_id"]}') as answer:
            event = ''
            for line in answer.iter_lines():
                key, _, value = line.partition(': ')
                if key == 'event':
                    event = value
                elif key == 'data' and event == 'complete':
                    return json.loads(value)[0]
                elif key == 'data' and event == 'error':
                    return json.loads(value)
        raise AssertionError('no answer')


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, 'PNG')
    return file.getvalue()


def same(a: dict, b: dict) -> bool:
    """Whether two answers are of the same image and settings; a run of several images differs in the last bits."""
    keys = ('network', 'label', 'exit', 'macs', 'reason')
    if any(a.get(key) != b[key] for key in keys):
        return False
    tops = [[[entry['probability'] for entry in e['top']] for e in answer['exits']] for answer in (a, b)]
    return np.allclose(*tops, rtol=0., atol=2e-4)


@pytest.fixture(scope='module')
def app(tmp_path_factory):
    app = App(tmp_path_factory.mktemp('app'))
    yield app
    app.process.terminate()
    app.process.wait(30)


@pytest.fixture(scope='module')
def calls(app):
    """For each of 50 images its file and, for each network, arguments with the answer to one caller alone; and how
    long that caller waited each time.
    """
    paths, calls, waits, caller = sorted(SAMPLES.glob('*.png')), [], [], Caller(app)
    for number in range(CLIENTS):
        image = Image.open(paths[number % len(paths)]).convert('RGB')
        data = png(Image.fromarray(np.roll(image, 3 * (number // len(paths)), axis=1)))
        answers = []
        for name, setting in zip(available_networks(), random.Random(number).sample(SETTINGS, 4)):
            arguments = (name, *setting, True)
            start = time.monotonic()
            answers.append((arguments, caller.classify(caller.upload(data), *arguments)))
            waits.append(time.monotonic() - start)
        calls.append((data, answers))
    for (_, one), (_, other) in itertools.combinations(calls, 2):  # else a mixed answer would go unnoticed
        assert not any(a == b and same(x, y) for (a, x), (b, y) in zip(one, other))
    return calls, waits


def bad_calls(caller: Caller, data: bytes, name: str):
    """Arguments, and a part of the message that must come back."""
    image, text = caller.upload(data), caller.upload(b'not an image')
    stranger = {'path': '/etc/hostname', 'meta': {'_type': 'gradio.FileData'}}
    return [
        ((None, name, '', None, True), 'no image given'),
        ((image, name, '30M', 0.5, True), 'not both'),
        ((image, name, '1M', None, True), 'below the first exit'),
        ((image, name, 'much', None, True), 'not a number of MACs'),
        ((image, name, '', 7, True), 'out of range'),
        ((image, 'resnet18', '', None, True), 'not in the list'),
        ((text, name, '', None, True), 'not an image'),
        ((stranger, name, '', None, True), 'not uploaded')]


def at_once(threads) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.exhaustive('4 minutes: two minutes of calls from 50 clients, and 200 of one client before')
def test_fifty_clients_for_two_minutes(app, calls, record_property):
    calls, alone = calls
    waits, wrong, memory = [], [], []
    start, cpu = time.monotonic(), app.cpu()

    def client(number: int) -> None:
        draw, caller, (data, answers) = random.Random(number), Caller(app), calls[number]
        try:
            bad = bad_calls(caller, data, answers[0][0][0])
            while time.monotonic() - start < SECONDS:
                if draw.random() < 0.2:
                    arguments, message = draw.choice(bad)
                    answer = caller.classify(*arguments)
                    if message not in str(answer.get('error')):
                        wrong.append((number, arguments, answer))
                else:
                    arguments, expected = draw.choice(answers)
                    begin = time.monotonic()
                    answer = caller.classify(caller.upload(data), *arguments)
                    waits.append(time.monotonic() - begin)
                    if not same(answer, expected):
                        wrong.append((number, arguments, answer))
        except Exception as error:
            wrong.append((number, repr(error)))

    def watch() -> None:
        for moment in (SECONDS / 2, SECONDS):
            time.sleep(max(0., start + moment - time.monotonic()))
            memory.append(app.memory())

    at_once([*(threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)),
             threading.Thread(target=watch)])
    record_property('measured', (
        f'{len(waits)} answers in {time.monotonic() - start:.0f} s, {1e3 * (app.cpu() - cpu) / len(waits):.0f} ms of '
        f'CPU time each; waiting p50 {statistics.median(waits):.2f} s, p95 {np.percentile(waits, 95):.2f} s, one '
        f'client alone p50 {statistics.median(alone):.2f} s, p95 {np.percentile(alone, 95):.2f} s; {memory[0]:.0f} MB '
        f'after one minute, {memory[1]:.0f} after two'))
    assert wrong == []
    assert memory[1] < 1.03 * memory[0]


def attacks(caller: Caller, data: bytes, name: str):
    """What each attack calls with."""
    image, spaces = caller.upload(data), '1' + ' ' * 10**6 + 'x'
    bomb, large = (caller.upload(png(Image.fromarray(np.full((side, side), 7, np.uint8)))) for side in (13_000, 4000))
    return {
        'huge text': [
            (image, name, spaces, None, True), (image, spaces, '', None, True), (image, name, '', spaces, True)],
        '13,000 x 13,000 PNG': [(bomb, name, '', None, True)],
        '4,000 x 4,000 PNG': [(large, name, '', None, True)],  # just small enough to be read
        'lists and None': [
            tuple(odd if i == k else value for i, value in enumerate((image, name, '', None, True)))
            for odd in ([], [[1] * 1000] * 100, None, {'a': [None]}) for k in range(5)]}


@pytest.mark.exhaustive('1 minute: four attacks of 10 s')
def test_others_hardly_wait_during_an_attack(app, calls, record_property):
    calls, _ = calls
    wrong, longest, measured = [], {}, []

    def client(number: int, waits: list, stop: threading.Event) -> None:
        caller, (data, answers) = Caller(app), calls[number]
        try:
            for arguments, expected in itertools.cycle(answers):
                begin = time.monotonic()
                if not same(caller.classify(caller.upload(data), *arguments), expected):
                    wrong.append((number, arguments))
                waits.append(time.monotonic() - begin)
                if stop.wait(0.5):
                    return
        except Exception as error:
            wrong.append((number, repr(error)))

    def attacker(arguments: list, stop: threading.Event, done: list) -> None:
        caller = Caller(app)
        for call in itertools.cycle(arguments):
            if stop.is_set():
                return
            with contextlib.suppress(httpx.HTTPStatusError):  # refused
                caller.classify(*call)
            done.append(call)

    data, answers = calls[0]
    for attack, arguments in {'no attack': [], **attacks(Caller(app), data, answers[0][0][0])}.items():
        stop, waits, done = threading.Event(), [], []
        threads = [threading.Thread(target=client, args=(number, waits, stop)) for number in range(4)]
        if arguments:
            threads += [threading.Thread(target=attacker, args=(arguments, stop, done)) for _ in range(4)]
        at_once([*threads, threading.Timer(10., stop.set)])
        longest[attack] = max(waits)
        measured.append(f'{attack}: {len(done)} calls, others wait up to {max(waits):.2f} s')
    record_property('measured', '; '.join(measured))
    assert wrong == []
    assert max(longest.values()) < longest['no attack'] + 1., measured
