"""Screenshots of the running app: the two in the README, or with --all every layout for review.

    python app/tools/screenshots.py [--chromium PATH] [--url URL] [--all DIR]

Starts the app unless --url names one. Needs playwright and a Chromium.
"""
import argparse
import shutil
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from timm_multiexit import InputError
from timm_multiexit.files import written_beside

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples import ASSETS  # noqa: E402

WIDE, NARROW = dict(width=1240, height=900), dict(width=390, height=844)
FLAGS = ['--no-sandbox', '--disable-background-networking', '--disable-component-update', '--disable-sync',
         '--disable-default-apps', '--no-first-run', '--force-color-profile=srgb']
SHOTS = {'one_image': dict(), 'data_set': dict(data=True, network='msfuse_cifar.cifar100')}
LAYOUTS = {
    f'{name}_{scheme}_{width}': dict(options, scheme=scheme, size=size)
    for name, options in {**SHOTS, 'confidence': dict(confidence=True)}.items()
    for scheme in ('light', 'dark') for width, size in (('wide', WIDE), ('narrow', NARROW))}


def find_chromium(path: str = '') -> str:
    """Path of a Chromium.

    Raises:
        InputError: none was found.
    """
    for name in [path] if path else ['chromium', 'chromium-browser', 'google-chrome']:
        found = shutil.which(name)
        if found:
            return found
    raise InputError(f"no Chromium found{f' at {path!r}' if path else ''}: install one or pass --chromium PATH")


def open_app(page: Page, url: str) -> None:
    """Opens the page and waits for its first answer."""
    page.goto(url)
    page.locator('#view .anytime').wait_for(timeout=120_000)


def shoot(
        browser, url: str, path: Path, data=False, confidence=False, network='', scheme='light', size=WIDE) -> None:
    """A screenshot of one view, the whole page."""
    page = browser.new_page(viewport=size, color_scheme=scheme, device_scale_factor=1)
    stop = '&stop=confidence&at=0.9' if confidence else ''
    open_app(page, f'{url}?__theme={scheme}&image=3&network={network}{stop}')
    if data:
        page.get_by_role('tab', name='Whole dataset').click()
        page.locator('#data-view .budget').wait_for()
    page.wait_for_timeout(600)  # transitions
    with written_beside(path) as partial:
        page.screenshot(path=partial, full_page=True)
    page.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--chromium', default='', metavar='PATH')
    parser.add_argument('--url', default='', help='of a running app')
    parser.add_argument('--all', default='', metavar='DIR', help="write every layout there, not the README's two")
    args = parser.parse_args()
    demo, url = None, args.url
    chromium = find_chromium(args.chromium)
    if not url:
        from layout import build_page
        from served import available_networks

        from app import launch_options
        demo = build_page(available_networks())
        url = demo.launch(prevent_thread_lock=True, quiet=True, **launch_options())[1]
    folder, shots = (Path(args.all), LAYOUTS) if args.all else (ASSETS, SHOTS)
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
            for name, options in shots.items():
                shoot(browser, url, folder / f'{name}.png', **options)
                print(folder / f'{name}.png')
            browser.close()
    finally:
        if demo is not None:
            demo.close()


if __name__ == '__main__':
    try:
        main()
    except InputError as error:
        sys.exit(f'screenshots.py: error: {error}')
