"""What a text that is published may not tell: paths, tokens, the user and the host."""
import pytest
from upload import check_private

from timm_multiexit.errors import InputError
from timm_multiexit.training.history import portable


def test_options_are_published_without_paths():
    options = dict(
        lr=0.1, dataset='torch/cifar10', initial_checkpoint=['runs/a/model.safetensors'], kd_checkpoint='b.pt',
        backbone_checkpoint='clients/c.pt',
        model_kwargs=dict(a=['/home/me/x.pt', 3]), mean='~/y.pt', drive='C:\\me\\z.pt', share='\\\\host\\share\\w.pt',
        model='local-dir:/home/me/net', kd_model_name=['hf-hub:org/net'])
    assert portable(options) == dict(
        lr=0.1, dataset='torch/cifar10', initial_checkpoint=['model.safetensors'], kd_checkpoint='b.pt',
        backbone_checkpoint='c.pt',
        model_kwargs=dict(a=['x.pt', 3]), mean='y.pt', drive='z.pt', share='w.pt', model='local-dir:net',
        kd_model_name=['hf-hub:org/net'])


@pytest.mark.parametrize('text, what', [
    ('read /home/someone/data', 'a path'), ('"/Users/someone/x"', 'a path'), ('in ~/data', 'a path'),
    ('C:\\Users\\me\\x', 'a path'), ('"C:\\\\Users\\\\me"', 'a path'), ('token: hf_' + 'a1' * 17, 'a token')])
def test_a_text_that_tells_about_this_machine_is_not_published(tmp_path, text, what):
    (tmp_path / 'notes.yaml').write_text(f'fine: 1\n{text}\n')
    with pytest.raises(InputError, match=f"'notes.yaml', line 2, holds {what}"):
        check_private(tmp_path)
    (tmp_path / 'notes.yaml').write_text('fine: https://host/home/x and 1/2, e.g. home/x, ~/.cache\n')
    (tmp_path / 'weights').write_bytes(b'\0' + text.encode())  # not text
    check_private(tmp_path)
    (tmp_path / 'page.html').write_bytes(b'\xe9\n' + text.encode())  # not UTF-8
    with pytest.raises(InputError, match=f"'page.html', line 2, holds {what}"):
        check_private(tmp_path)


def test_the_owner_of_the_repository_may_be_named(tmp_path, monkeypatch):
    monkeypatch.setattr('getpass.getuser', lambda: 'alice')
    (tmp_path / 'README.md').write_text('hf-hub:alice/net')
    check_private(tmp_path, 'alice')
    with pytest.raises(InputError, match='the user name'):
        check_private(tmp_path, 'bob')
