"""The app's API through gradio_client, with the shipped weights."""
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip('gradio', reason="the app needs gradio: pip install 'timm-multiexit[app]'")

from app_support import IMAGES  # noqa: E402
from gradio_client import Client, handle_file  # noqa: E402
from gradio_client.exceptions import AppError  # noqa: E402

pytestmark = pytest.mark.browser
pytest_plugins = ['app_support']  # its fixture `server`


@pytest.fixture(scope='module')
def client(server):
    return Client(server.url, verbose=False, httpx_kwargs=dict(timeout=60.))


def classify(client, image, network, budget='', confidence=None, calibrated=True):
    return client.predict(
        image=None if image is None else handle_file(str(image)), network=network, budget=budget,
        confidence=confidence, calibrated=calibrated, api_name='/classify')


def test_the_api_has_names_and_types(client):
    endpoints = client.view_api(return_format='dict', print_info=False)['named_endpoints']
    assert set(endpoints) == {'/classify', '/networks', '/policy'}
    names = [p['parameter_name'] for p in endpoints['/classify']['parameters']]
    assert names == ['image', 'network', 'budget', 'confidence', 'calibrated']
    types = [p['python_type']['type'] for p in endpoints['/classify']['parameters']]
    assert 'filepath' in types[0] or 'path' in types[0]
    assert types[2] == 'str' and types[3].startswith('float') and types[4] == 'bool'
    assert endpoints['/classify']['returns'][0]['label'] == 'answer'


def test_networks_with_weights_are_listed(client, server):
    assert client.predict(api_name='/networks') == server.names


def test_an_image_is_classified_in_one_run(client, server):
    before = server.calls
    answer = classify(client, IMAGES[0], server.names[0])
    assert server.calls == before + 1
    expected = server.expected(IMAGES[0])
    assert answer['num_exits'] == len(answer['exits']) == len(expected) == answer['exit']
    for row, p in zip(answer['exits'], expected):
        assert row['top'][0]['label'] == server.network.labels[int(p.argmax())]
        assert row['top'][0]['probability'] == pytest.approx(float(p.max()), abs=2e-4)
    macs = [row['macs'] for row in answer['exits']]
    assert macs == list(server.network.costs.macs)
    assert [row['milliseconds'] for row in answer['exits']] == sorted(row['milliseconds'] for row in answer['exits'])


def test_extreme_budgets(client, server):
    first, full = server.network.costs.macs[0], server.network.costs.macs[-1]
    assert classify(client, IMAGES[1], server.names[0], str(first))['exit'] == 1
    assert classify(client, IMAGES[1], server.names[0], str(full))['exit'] == server.network.model.num_exits
    assert classify(client, IMAGES[1], server.names[0], '1e30')['exit'] == server.network.model.num_exits
    for budget, message in [(str(first - 1), 'below the first exit'), ('1000', 'below the first exit'),
                            ('1', 'did you mean 1M'), ('0', 'not a number of MACs'), ('-3M', 'not a number of MACs'),
                            ('nan', 'not a number of MACs'), ('a lot', 'not a number of MACs')]:
        with pytest.raises(AppError, match=message):
            classify(client, IMAGES[1], server.names[0], budget)


def test_confidence(client, server):
    answer = classify(client, IMAGES[0], server.names[0], confidence=0.5)
    confidences = server.expected(IMAGES[0]).amax(1)
    assert answer['exit'] == next((k + 1 for k, p in enumerate(confidences) if p >= 0.5), len(confidences))
    with pytest.raises(AppError, match='above 0 and up to 1'):
        classify(client, IMAGES[0], server.names[0], confidence=1.5)
    with pytest.raises(AppError, match='not both'):
        classify(client, IMAGES[0], server.names[0], '30M', 0.5)


def test_files_that_are_not_images(client, server, tmp_path):
    (tmp_path / 'text.png').write_text('not an image')
    (tmp_path / 'paper.pdf').write_bytes(b'%PDF-1.7 nothing in it')
    (tmp_path / 'empty.jpg').write_bytes(b'')
    Image.open(IMAGES[0]).resize((300, 300)).save(tmp_path / 'whole.jpg')
    (tmp_path / 'cut.jpg').write_bytes((tmp_path / 'whole.jpg').read_bytes()[:4000])
    for name, message in [('text.png', 'is not an image'), ('paper.pdf', 'is not an image'),
                          ('empty.jpg', 'is not an image'), ('cut.jpg', 'damaged or truncated')]:
        with pytest.raises(AppError, match=message):
            classify(client, tmp_path / name, server.names[0])
    with pytest.raises(AppError, match='no image given'):
        classify(client, None, server.names[0])
    notes = classify(client, tmp_path / 'whole.jpg', server.names[0])['notes']
    assert any('shrunk from 300 x 300' in note for note in notes)
    with pytest.raises(AppError):
        classify(client, IMAGES[0], 'no_such_net')


def test_policies(client, server):
    if server.network.config is None:
        pytest.skip('no exit config is stored with the shipped weights')
    full = server.network.costs.macs[-1]
    found = client.predict(network=server.names[0], average_budget=str(full / 2), api_name='/policy')
    assert found['thresholds'] == pytest.approx(server.network.config.policy_for(full / 2).thresholds)
    with pytest.raises(AppError, match='cannot be kept'):
        client.predict(network=server.names[0], average_budget='1M', api_name='/policy')


def test_ten_visitors_at_once_get_their_own_answers(server):
    turned = [Image.open(path).convert('RGB').rotate(90 * (i // 8 + i % 4)) for i, path in enumerate(IMAGES * 2)][:10]

    def visit(i, folder):
        path = folder / f'{i}.png'
        turned[i].save(path)
        return path, classify(Client(server.url, verbose=False, httpx_kwargs=dict(timeout=60.)), path, server.names[0])

    import tempfile
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda i: visit(i, Path(folder)), range(10)))
        for path, answer in answers:
            for row, p in zip(answer['exits'], server.expected(path)):
                assert row['top'][0]['probability'] == pytest.approx(float(p.max()), abs=2e-4)
    assert len({tuple(row['top'][0]['probability'] for row in answer['exits']) for _, answer in answers}) == 10
