"""The static page: what Python answers, in a browser, without a request to anyone else."""
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from conftest import SAMPLES, calibrated_network
from PIL import Image

pytest.importorskip('onnxruntime')

from timm_multiexit import EarlyExitRunner, InputError, load_exit_config, load_model  # noqa: E402
from timm_multiexit.cli import main  # noqa: E402
from timm_multiexit.files import read_json  # noqa: E402
from timm_multiexit.inference.engine import make_engine  # noqa: E402
from timm_multiexit.inference.preprocess import Preprocessing  # noqa: E402
from timm_multiexit.inference.web_page import BUDGETS, export_web  # noqa: E402
from timm_multiexit.pretrained.record import TrainingData, describe  # noqa: E402
from timm_multiexit.stopping.solve import budget_grid  # noqa: E402

NAME = 'msfuse_cifar_budgeted.cifar10'
PATHS = sorted(SAMPLES.glob('*.png'))


@pytest.mark.parametrize('content, words', [(b'', 'missing'), (b'another package', 'is not the package')])
def test_another_package_is_refused_and_nothing_written(content, words, tmp_path):
    package = tmp_path / 'package.tgz'
    if content:
        package.write_bytes(content)
    with pytest.raises(InputError, match=words):
        export_web(*calibrated_network(), tmp_path / 'web', 'network', package)
    assert not (tmp_path / 'web').exists()


def test_images_of_more_than_8_bits_are_refused(tmp_path):
    model, config = calibrated_network()
    describe(model, TrainingData('folder', (0., 4095.)), None)
    with pytest.raises(InputError, match='browsers keep 8 bits of a channel'):
        export_web(model, config, tmp_path / 'web', 'network')


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    """Its folder and address; onnxruntime-web is downloaded unless the cache folder has it."""
    folder = tmp_path_factory.mktemp('site') / 'web'
    assert main(['export', NAME, '--web', str(folder)]) == 0
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()
    server.server_close()


@pytest.fixture(scope='module')
def browser():
    from playwright.sync_api import sync_playwright
    from screenshots import CHROMIUM, FLAGS
    assert CHROMIUM, 'browser tests need a Chromium'
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(site, browser, request):
    """The page with its first answer; it may log no error and contact no other machine."""
    options = dict(viewport=dict(width=1100, height=800), **getattr(request, 'param', {}))
    context, errors, requests = browser.new_context(**options), [], []
    page = context.new_page()
    page.on('console', lambda m: errors.append(m.text) if m.type == 'error' else None)
    page.on('pageerror', lambda e: errors.append(str(e)))
    page.on('request', lambda r: requests.append(r.url))
    page.goto(site[1])
    page.locator('#output[data-runs="1"]').wait_for(timeout=60_000)
    yield page
    context.close()
    assert errors == []
    assert len(requests) > 10 and all(url.startswith((site[1], 'data:', 'blob:')) for url in requests)


def answer_after(page, act):
    """What the page shows once it has run again: exit, label, confidence."""
    runs = int(page.locator('#output').get_attribute('data-runs'))
    act()
    page.locator(f'#output[data-runs="{runs + 1}"]').wait_for()
    shown = page.evaluate("({...document.querySelector('#output').dataset})")
    return int(shown['exit']), shown['label'], float(shown['confidence'])


def slide(page, step):
    page.evaluate("""step => { const slider = document.querySelector('#budget'); slider.value = step;
        slider.dispatchEvent(new Event('input')); }""", step)


@pytest.mark.browser
def test_the_page_answers_as_python_does(page, site):
    model, config = load_model(NAME), load_exit_config(NAME)
    about = read_json(site[0] / 'page.json', 'page')
    budgets = budget_grid(config.exit_macs[0], config.exit_macs[-1], BUDGETS)
    assert len(about['policies']) == len(budgets) and len(PATHS) == 10
    engine, preprocess, exits = make_engine(model, 'onnx'), Preprocessing.of(model), set()
    images = torch.stack([preprocess(path)[0] for path in PATHS])
    for step in (0, 3, 6, BUDGETS - 1):
        policy = config.policy_for(budgets[step])
        run = EarlyExitRunner(engine, policy, costs=config.costs).run(images)
        answer_after(page, lambda step=step: slide(page, step))
        for i, button in enumerate(page.locator('#samples button').all()):
            exit_number, label, confidence = answer_after(page, button.click)
            assert (exit_number, label) == (run.exit_index[i] + 1, config.class_names[run.prediction[i]])
            assert confidence == pytest.approx(float(run.confidence[i]), abs=1e-4)
            exits.add(exit_number)
        shown = page.locator('#policy').text_content().replace('\u00a0', ' ')
        assert shown == (f'{policy.expected_macs / 1e6:.1f} M MACs per image, expected accuracy '
                         f'{policy.expected_accuracy:.1f}%')
    assert len(exits) >= 3
    assert page.locator('.class').count() == 3


@pytest.mark.browser
def test_the_page_prepares_images_as_python_does(page, tmp_path):
    preprocess = Preprocessing.of(load_model(NAME))
    std = 255. * np.array(preprocess.std)[:, None, None]

    def seen():
        return np.float32(page.evaluate('Array.from(image.data)')).reshape(preprocess.input_size)

    for path, button in zip(PATHS, page.locator('#samples button').all()):
        answer_after(page, button.click)
        np.testing.assert_array_equal(seen(), preprocess(path)[0].numpy())
    # Odd sizes, so that the crop begins between two pixels; resized, with a part that is transparent.
    random = np.random.default_rng(0).integers(256, size=(32, 37, 3), dtype=np.uint8)
    Image.fromarray(random).save(tmp_path / 'wide.png')
    answer_after(page, lambda: page.locator('#file').set_input_files(str(tmp_path / 'wide.png')))
    np.testing.assert_array_equal(seen(), preprocess(tmp_path / 'wide.png')[0].numpy())
    photo = Image.open(PATHS[1]).convert('RGBA').resize((640, 480), Image.Resampling.BICUBIC)
    photo.paste((0, 0, 0, 0), (0, 0, 320, 200))
    photo.save(tmp_path / 'photo.png')
    answer_after(page, lambda: page.locator('#file').set_input_files(str(tmp_path / 'photo.png')))
    levels = abs(seen() - preprocess(tmp_path / 'photo.png')[0].numpy()) * std
    print(f'resized: {levels.mean():.2f} of 255 levels apart on average, at most {levels.max():.0f}')
    assert levels.mean() < 3.


@pytest.mark.browser
def test_an_image_chosen_while_the_network_loads_is_answered_first(page, site):
    held = []
    page.route('**/network.onnx', lambda route: held.append(route))
    page.reload(wait_until='commit')
    page.locator('#samples button').nth(4).click()
    while not held:
        page.wait_for_timeout(50)
    page.wait_for_timeout(200)  # the image is decoded, and waits
    held[0].continue_()
    page.locator('#output[data-runs="1"]').wait_for()
    page.wait_for_timeout(200)
    assert page.locator('#output').get_attribute('data-label') == 'automobile'
    for _ in range(2):  # and a file may be chosen again
        answer_after(page, lambda: page.locator('#file').set_input_files(str(PATHS[0])))


@pytest.mark.browser
def test_a_file_that_is_no_image(page, tmp_path):
    (tmp_path / 'text.png').write_text('no image')
    page.locator('#file').set_input_files(str(tmp_path / 'text.png'))
    page.get_by_text('not an image that this browser reads').wait_for()
    assert answer_after(page, page.locator('#samples button').nth(4).click)[1] == 'automobile'


@pytest.mark.browser
@pytest.mark.parametrize('page', [dict(color_scheme='light'), dict(color_scheme='dark')], indirect=True,
                         ids=['light', 'dark'])
def test_narrow_in_light_and_dark(page, request):
    for width in (1100, 360):
        page.set_viewport_size(dict(width=width, height=800))
        assert page.evaluate('document.scrollingElement.scrollWidth') <= width
    ink, paper = page.evaluate("""() => { const s = getComputedStyle(document.body);
        return [s.color, s.backgroundColor].map(c => c.match(/[0-9]+/g).slice(0, 3).map(Number)); }""")
    light = request.node.callspec.id == 'light'
    assert (sum(ink) < sum(paper)) == light and abs(sum(ink) - sum(paper)) > 400
