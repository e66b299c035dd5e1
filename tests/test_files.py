"""Writing where one is told: links, modes, pipes, full disks, and a check before the work."""
import errno
import os
import resource
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from timm_multiexit.errors import InputError
from timm_multiexit.files import held, read_json, read_yaml, require_writable, write_json, written_beside


def test_a_link_is_followed_and_a_mode_kept(tmp_path):
    target, link = tmp_path / 'elsewhere' / 'target.json', tmp_path / 'link.json'
    write_json(target, 1)
    target.chmod(0o600)
    link.symlink_to(target)
    write_json(link, 2)
    assert link.is_symlink() and read_json(target, 'file') == 2
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    dangling = tmp_path / 'dangling.json'
    dangling.symlink_to(tmp_path / 'new' / 'file.json')
    write_json(dangling, 3)
    assert dangling.is_symlink() and read_json(tmp_path / 'new' / 'file.json', 'file') == 3


def test_pipes_and_devices_are_written_to(tmp_path):
    pipe = tmp_path / 'pipe'
    os.mkfifo(pipe)
    received = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_text()))
    reader.start()
    require_writable(pipe)
    write_json(pipe, [1])
    reader.join(10)
    assert received == ['[1]\n'] and stat.S_ISFIFO(pipe.stat().st_mode)
    null = tmp_path / 'null'
    null.symlink_to('/dev/null')
    write_json(null, 1)
    assert stat.S_ISCHR(null.stat().st_mode)
    with pytest.raises(InputError, match="'/dev/full' cannot be written .No space left"):
        write_json('/dev/full', 1)


@pytest.mark.parametrize('place', ['folder', 'file/x.json', '/proc/x', '/proc/self/status/x', 'x' * 300])
def test_a_bad_place_is_known_before_the_work(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    Path('folder').mkdir()
    Path('file').write_text('')
    for attempt in (require_writable, lambda path: write_json(path, 1)):
        with pytest.raises(InputError, match='cannot be written') as raised:
            attempt(place)
        assert '\n' not in str(raised.value)
    require_writable('new/' + 'x' * 250 + '.json')
    assert not any(Path('new').iterdir())


def test_a_held_folder_is_cleared_of_partial_files_alone(tmp_path):
    partial = tmp_path / f'.file.{os.getpid()}.json'
    others = [tmp_path / '.notes.md.swp', tmp_path / '.x.d' / 'file']
    others[1].parent.mkdir()
    for path in (partial, *others):
        path.write_text('')
    with held(tmp_path):
        assert not partial.exists() and all(path.exists() for path in others)


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / 'file.json'
    write_json(path, 'old')
    with pytest.raises(InputError, match='No space left'), written_beside(path) as partial:
        partial.write_text('half of the n')
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(InputError, match='File too large'):
            write_json(path, 'n' * 5000)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
        with pytest.raises(InputError, match="lock' cannot be written"), held(tmp_path):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert read_json(path, 'file') == 'old'
    assert sorted(p.name for p in tmp_path.iterdir()) == ['.lock', 'file.json']


@pytest.mark.parametrize('text', [b'', b'{', b'\xff\xfe\x00', b'[' * 100_000, b'!!python/object/apply:os.getpid []'])
def test_files_that_cannot_be_read_are_input_errors(tmp_path, text):
    path = tmp_path / 'file'
    path.write_bytes(text)
    for read in (read_json, read_yaml):
        if read is read_json or text:  # empty YAML is nothing
            with pytest.raises(InputError, match='cannot be read') as raised:
                read(path, 'file')
            assert '\n' not in str(raised.value)


def test_letters_of_other_alphabets_under_a_locale_without_them(tmp_path):
    """Files are UTF-8 everywhere; a terminal that lacks a letter shows its number."""
    (tmp_path / 'config.yaml').write_text('experiment: Äpfel 猫\n', encoding='utf-8')
    script = f"""
import locale, sys
from timm_multiexit.errors import run_command
from timm_multiexit.files import read_json, write_json
from timm_multiexit.training.options import parse_train_args

def run(argv):
    args = parse_train_args('', ['--config', r'{tmp_path}/config.yaml'])
    write_json(r'{tmp_path}/a.json', args.experiment)
    assert read_json(r'{tmp_path}/a.json', 'file') == args.experiment
    print(locale.getpreferredencoding(False), args.experiment)

sys.exit(run_command('test', run))
"""
    env = {**os.environ, 'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0', 'PYTHONIOENCODING': ''}
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [b'ANSI_X3.4-1968', b'\\xc4pfel', b'\\u732b']
