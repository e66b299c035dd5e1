"""The two screenshots in the README, of the running app.

    python app/tools/screenshots.py

Needs playwright and a Chromium.
"""
import os
import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples import ASSETS  # noqa: E402

FLAGS = ['--no-sandbox', '--disable-background-networking', '--disable-component-update', '--disable-sync',
         '--disable-default-apps', '--no-first-run', '--force-color-profile=srgb']
CHROMIUM = next(filter(None, map(shutil.which, (
    os.environ.get('CHROMIUM', ''), 'chromium', 'chromium-browser', 'google-chrome'))), None)


def main() -> None:
    if not CHROMIUM:
        sys.exit('screenshots.py: error: no Chromium found: install one, or name it in CHROMIUM')
    from layout import build_page
    from served import available_networks

    from app import launch_options
    demo = build_page(available_networks())
    url = demo.launch(prevent_thread_lock=True, quiet=True, **launch_options())[1]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport=dict(width=1240, height=900), device_scale_factor=1)
        for name, network in (('one_image', 'msfuse_cifar.cifar10'), ('data_set', 'msfuse_cifar.cifar100')):
            page.goto(f'{url}?__theme=light&image=3&network={network}')
            page.locator('#view .anytime').wait_for(timeout=120_000)
            if name == 'data_set':
                page.get_by_role('tab', name='Whole dataset').click()
                page.locator('#data-view .budget').wait_for()
            page.wait_for_timeout(600)  # transitions
            page.screenshot(path=ASSETS / f'{name}.png', full_page=True)
            print(ASSETS / f'{name}.png')
        browser.close()
    demo.close()


if __name__ == '__main__':
    main()
