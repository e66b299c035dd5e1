"""The app in a real browser, with the shipped weights."""
import os
import re
import statistics
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip('gradio', reason="the app needs gradio: pip install 'timm-multiexit[app]'")

from answers import spoken  # noqa: E402
from app_support import IMAGES  # noqa: E402
from examples import load_curve  # noqa: E402
from served import display_name, get_network  # noqa: E402

pytestmark = pytest.mark.browser
pytest_plugins = ['app_support']  # its fixture `server`
SLIDER_MS = 100.


@pytest.fixture(scope='module')
def browser():
    sync_api = pytest.importorskip('playwright.sync_api', reason='browser tests need playwright (pip)')
    from screenshots import CHROMIUM, FLAGS
    if not CHROMIUM:
        pytest.skip('browser tests need a Chromium')
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Visit:
    """A page that must log no error and contact no other machine."""

    def __init__(self, browser, url, query='', **kwargs):
        self.errors, self.strangers = [], []
        self.context = browser.new_context(viewport=kwargs.pop('viewport', dict(width=1240, height=900)), **kwargs)
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.page.on('console', lambda m: self.errors.append(m.text) if m.type == 'error' else None)
        self.page.on('pageerror', lambda e: self.errors.append(str(e)))
        self.page.on('request', self._watch)
        self.page.goto(url + query)
        self.page.locator('#view .anytime').wait_for()

    def _watch(self, request):
        if not re.match(r'(https?|wss?)://(127\.0\.0\.1|localhost)[:/]|data:|blob:', request.url):
            self.strangers.append(request.url)

    def __enter__(self):
        return self.page

    def __exit__(self, kind, *_):
        self.context.close()
        if kind is None:
            assert self.errors == [] and self.strangers == []


# Measures in the page the time from the slider's event to the view of its value.
TIMER = """([control, view]) => {
  const slider = document.querySelector(control + ' input[type=range]'), step = Number(slider.step);
  let start = null;
  window.times = [];
  slider.addEventListener('input', () => { start = performance.now(); }, true);
  new MutationObserver(() => {
    const shown = document.querySelector(view + ' [data-limit]');
    if (start === null || !shown || Math.abs(shown.dataset.limit - slider.value) > 0.99 * step) return;
    window.times.push(performance.now() - start);
    start = null;
  }).observe(document.querySelector(view), {childList: true, subtree: true, attributes: true});
}"""


def answering(page) -> int:
    return int(page.locator('#view .anytime').get_attribute('data-exit'))


def press(page, key, count):
    """Presses a key on the focused slider and waits for the answer."""
    page.keyboard.press(key)
    page.wait_for_function('n => window.times.length >= n', arg=count)


def announced(page, region, exit_number) -> str:
    """The text for screen readers, which is updated just after the picture."""
    page.wait_for_function(
        '([region, start]) => region.textContent.startsWith(start)',
        arg=[region.element_handle(), f'Exit {exit_number} of'])
    return region.text_content()


def test_the_slider_by_keyboard(server, browser):
    with Visit(browser, server.url) as page:
        calls = server.calls
        page.locator('#cards button[data-index="1"]').focus()
        page.keyboard.press('Enter')
        page.locator('#cards button[data-index="1"][aria-pressed=true]').wait_for()
        page.locator('#view a.permalink[href*="image=2"]').wait_for()
        assert server.calls == calls + 1

        calls = server.calls
        status = page.locator('.mx-status [role=status]').first
        status.evaluate('e => { window.region = e; }')
        slider = page.locator('#budget input[type=range]')
        slider.focus()
        page.evaluate(TIMER, ['#budget', '#view'])
        press(page, 'Home', 1)
        exits, count = [answering(page)], 1
        texts = [announced(page, status, exits[0])]
        while float(slider.input_value()) < float(slider.get_attribute('max')):
            count += 1
            press(page, 'ArrowRight', count)
            exits.append(answering(page))
            texts.append(announced(page, status, exits[-1]))
        assert exits[0] == 1 and exits[-1] == server.network.model.num_exits
        assert exits == sorted(exits) and set(exits) == set(range(1, exits[-1] + 1))
        assert server.calls == calls, 'a move of the slider ran the model'
        assert page.evaluate('e => window.region.isConnected') and len(set(texts)) >= exits[-1]
        times = page.evaluate('window.times')
        median = statistics.median(times)
        print(f'\nslider: median {median:.0f} ms, largest {max(times):.0f} ms over {len(times)} moves')
        if 'SLIDER_TIMES' in os.environ:
            Path(os.environ['SLIDER_TIMES']).write_text('\n'.join(f'{t:.1f}' for t in times))
        assert median <= SLIDER_MS


def test_stopping_by_confidence(server, browser):
    with Visit(browser, server.url, '?image=3') as page:
        page.get_by_label('Confidence', exact=True).check()
        page.locator('#view .levelled').wait_for()
        assert page.locator('#budget').is_hidden()
        calls = server.calls
        slider = page.locator('#confidence input[type=range]')
        slider.focus()
        page.evaluate(TIMER, ['#confidence', '#view'])
        press(page, 'Home', 1)
        exits = [answering(page)]
        for count in range(2, 12):
            press(page, 'PageUp', count)
            exits.append(answering(page))
            level = float(slider.input_value())
            bars = page.locator('#view .exit').evaluate_all(
                "es => es.map(e => parseFloat(e.style.getPropertyValue('--p')) / 100)")
            # The bars are rounded: a confidence this close to the level may or may not have reached it.
            expected = {next((k + 1 for k, p in enumerate(bars) if p >= level + slack), len(bars))
                        for slack in (-1e-3, 1e-3)}
            assert exits[-1] in expected
            if level >= float(slider.get_attribute('max')):
                break
        assert exits == sorted(exits) and server.calls == calls


def test_own_files(server, browser, tmp_path):
    (tmp_path / 'text.png').write_text('not an image')
    Image.open(IMAGES[0]).resize((640, 480)).save(tmp_path / 'photo.png')
    with Visit(browser, server.url) as page:
        page.get_by_role('button', name='Upload, paste or take a photo').click()
        chooser = page.locator('#image input[type=file]')
        chooser.set_input_files(str(tmp_path / 'photo.png'))
        page.get_by_text('shrunk from 640 x 480').wait_for()
        assert page.locator('#cards button[aria-pressed=true]').count() == 0
        assert page.locator('#view .permalink').count() == 0
        page.locator('#image').get_by_label('Clear').or_(page.locator('#image').get_by_label('Remove')).first.click()
        page.locator('#image input[type=file]').set_input_files(str(tmp_path / 'text.png'))
        page.get_by_text('is not an image').first.wait_for()


def test_hurried_visitor(server, browser):
    # The second choice arrives while the first is being answered: the page must show the second.
    with Visit(browser, server.url) as page:
        for wait_ms, (first, second) in {0: (2, 4), 5: (1, 3), 20: (4, 0), 50: (5, 2), 100: (3, 1)}.items():
            page.evaluate("""([first, second, wait]) => {
                const choose = (i) => document.querySelector(`#cards button[data-index="${i}"]`).click();
                choose(first);
                if (wait) setTimeout(choose, wait, second); else choose(second); }""", [first, second, wait_ms])
            page.locator(f'#view a[href*="image={second + 1}"]').wait_for()
            page.wait_for_timeout(300)  # an earlier answer must not overwrite it
            assert page.locator(f'#view a[href*="image={second + 1}"]').count() == 1
            pressed = page.locator('#cards button[aria-pressed=true]').get_attribute('data-index')
            assert pressed == str(second)


def test_links_and_visitors_apart(server, browser):
    first = server.network.costs.macs[1] / 1e6
    with Visit(browser, server.url, f'?image=2&stop=budget&at={first + 0.6:.1f}') as one, \
            Visit(browser, server.url, '?image=4&stop=confidence&at=0.55') as other:
        assert answering(one) == 2 and one.locator('#view .flag').count() == 1
        assert other.locator('#view .levelled').count() == 1
        other.locator('#cards button[data-index="0"]').click()
        other.locator('#view a[href*="image=1"]').wait_for()
        one.get_by_label('Calibrated probabilities').uncheck()
        one.wait_for_timeout(500)
        assert 'image=2' in one.locator('#view .permalink').get_attribute('href')
        link = one.locator('#view .permalink[href*="raw=1"]').get_attribute('href')
    with Visit(browser, server.url, link) as page:
        assert not page.get_by_label('Calibrated probabilities').is_checked()
        assert page.locator('#view .permalink').get_attribute('href') == link
    with Visit(browser, server.url, '?network=none&image=99&stop=x&at=nan') as page:  # falls back to the defaults
        assert 'image=1' in page.locator('#view .permalink').get_attribute('href')


def test_other_networks(server, browser):
    if len(server.names) < 2:
        pytest.skip('one network alone has weights')
    with Visit(browser, server.url) as page:
        for name in server.names[1:]:
            other = get_network(name)
            before = page.locator('#view .what').text_content()
            page.get_by_role('tab', name='One image').click()
            page.get_by_label('Network', exact=True).click()
            page.get_by_role('option', name=display_name(name), exact=True).click()
            page.locator(f'#view a.permalink[href*="{name}"]').wait_for()
            answer = page.locator('#view .what').text_content()
            assert any(spoken(label) in answer for label in other.labels) and answer != before
            assert page.locator('#view .exit').count() == other.model.num_exits
            page.get_by_role('tab', name='Whole dataset').click()
            page.locator('#data-view .budget').wait_for()
            curve = load_curve(other.name, other.config)
            for _ in range(50):  # the previous network's view stays until the new one arrives
                budget = float(page.locator('#average input[type=range]').input_value()) * 1e6
                expected = f'{curve.at(min(budget, other.config.exit_macs[-1])).accuracy:.1f}%'
                if expected in page.locator('#data-view').text_content():
                    break
                page.wait_for_timeout(100)
            assert expected in page.locator('#data-view').text_content()
            assert page.locator('#data-view .stream .exit').count() == other.model.num_exits
    with Visit(browser, server.url, f'?network={server.names[1]}&image=2') as page:
        assert server.names[1] in page.locator('#view .permalink').get_attribute('href')


def test_the_dataset_view(server, browser):
    if server.network.config is None:
        pytest.skip('no exit config is stored with the shipped weights')
    with Visit(browser, server.url) as page:
        page.get_by_role('tab', name='Whole dataset').click()
        calls = server.calls
        page.locator('#data-view .budget').wait_for()
        slider = page.locator('#average input[type=range]')
        slider.focus()
        page.evaluate(TIMER, ['#average', '#data-view'])
        shares, costs = [], []
        for count, key in enumerate(('Home', 'PageUp', 'PageUp', 'PageUp', 'End'), 1):
            press(page, key, count)
            bars = page.locator('#data-view .stream .exit').evaluate_all(
                "es => es.map(e => parseFloat(e.style.getPropertyValue('--share')))")
            assert sum(bars) == pytest.approx(1., abs=0.01)
            shares.append(bars)
            costs.append(sum(s * c for s, c in zip(bars, server.network.config.exit_macs)))
            assert page.locator('#data-view .leaving').count() in (0, len(bars))
        assert shares[0][0] > 0.9 and shares[-1][-1] > 0.9
        assert costs == sorted(set(costs))
        if page.locator('#diagrams .reliability').count():
            page.get_by_text('with temperature scaling').wait_for()
            page.locator('#scaled input').uncheck()
            page.get_by_text('as trained').wait_for()
        assert server.calls == calls


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_narrow_and_wide_in_light_and_dark(server, browser, scheme):
    with Visit(browser, server.url, f'?__theme={scheme}', color_scheme=scheme) as page:
        for width in (1240, 700, 390):
            page.set_viewport_size(dict(width=width, height=844))
            page.wait_for_timeout(200)
            assert page.evaluate('document.scrollingElement.scrollWidth') <= width
            outside = page.locator('#view .door, #view .bar, #view .savings').evaluate_all(
                'es => es.filter(e => { const r = e.getBoundingClientRect();'
                ' return r.left < -1 || r.right > innerWidth + 1; }).length')
            assert outside == 0
        ink, paper = page.evaluate("""() => { const s = e => getComputedStyle(document.querySelector(e));
            return [s('#view .what').color, s('#view .verdict').backgroundColor].map(
                c => c.match(/[0-9.]+/g).slice(0, 3).map(Number)); }""")
        assert (sum(ink) < sum(paper)) == (scheme == 'light') and abs(sum(ink) - sum(paper)) > 400
