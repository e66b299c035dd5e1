"""The README's Python snippets run, in their order and in one namespace, as a reader would paste them."""
import re
import shutil

from conftest import PROJECT


def test_snippets_run_in_order(tmp_path, monkeypatch):
    text = (PROJECT / 'README.md').read_text(encoding='utf-8')
    snippets = list(re.finditer(r'^```python\n(.*?)^```', text, re.MULTILINE | re.DOTALL))
    assert snippets
    samples = 'timm_multiexit/samples'  # paths in the README start at the clone's root
    shutil.copytree(PROJECT / samples, tmp_path / samples)
    monkeypatch.chdir(tmp_path)
    namespace = {'__name__': 'readme'}
    for snippet in snippets:
        line = text.count('\n', 0, snippet.start(1))
        exec(compile('\n' * line + snippet[1], 'README.md', 'exec'), namespace)
