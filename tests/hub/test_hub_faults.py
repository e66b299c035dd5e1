"""Faults while publishing and loading: a clear message, nothing half published, and a retry succeeds."""
import json
import shutil
import signal
from pathlib import Path

import pytest
import timm
import torch
import yaml
from hub_server import Fault
from hub_support import REPO, copy_of, write
from safetensors.torch import load_file, save_file

from timm_multiexit.files import write_json

pytest_plugins = ['hub_support']  # its fixtures

STEPS = [
    'POST /api/repos/create', 'GET /api/models/me/[^/]+$', 'GET .*/tree/', 'POST .*/preupload/',
    'POST .*/lfs/objects/batch', 'PUT /lfs/', 'POST .*/commit/',
]


def published(server) -> bool:
    repository = server.repositories.get(REPO)
    return repository is not None and len(repository.branches['main']) > 1


@pytest.mark.parametrize('step', STEPS)
def test_server_goes_down(client, server, folder, step):
    server.faults.append(Fault(step, 'down'))
    client.send(folder).refused('cannot be reached')
    assert not published(server)
    server.recover()
    client.send(folder).ok()
    assert published(server) and len(server.commits(REPO)) == 2
    client.load().ok()


@pytest.mark.parametrize('step', ['GET /api/models/me/[^/]+$', 'GET .*/resolve/'])
def test_server_goes_down_after_the_commit(client, server, final, step):
    """A failed check after the commit is reported, and the next push finds everything in place."""
    # The same requests come before the commit too, so the fault starts with the commit.
    server.hooks['POST .*/commit/'] = lambda: server.faults.append(Fault(step, 'down'))
    client.push(final).refused('published, but', 'cannot be reached')
    assert published(server)
    server.hooks.clear()
    server.recover()
    assert 'unchanged' in client.push(final).ok().out


@pytest.mark.slow('40 s of CPU time: 22 kills, each gone on with')
def test_a_push_killed_after_any_request_publishes_all_or_nothing(client, server, final):
    client.push(final).ok()
    count, whole = len(server.requests), server.contents(REPO)
    for k in range(1, count):
        server.reset()
        client.clear_cache()
        assert client.push_killed(server, k, final) == -signal.SIGKILL, f'{k} of {count} requests'
        after = server.requests[-1]
        assert not published(server) or server.contents(REPO) == whole, f'killed after {after}'
        client.push(final).ok()
        assert server.contents(REPO) == whole and len(server.commits(REPO)) == 2, f'killed after {after}'


@pytest.mark.parametrize('step, status, words', [
    ('POST /api/repos/create', 401, ['401', 'HF_TOKEN']),
    ('POST /api/repos/create', 403, ['403', 'token']),
    ('POST .*/commit/', 403, ['403', 'nothing was published']),
    ('POST .*/preupload/', 404, ['404', 'no such repository']),
    ('POST .*/commit/', 409, ['409', 'run this again']),
    ('POST .*/commit/', 412, ['412', 'someone else changed']),
    ('PUT /lfs/', 500, ['500', 'nothing was published']),
    ('POST .*/preupload/', 429, ['429', 'in 7 s']),
    ('POST .*/commit/', 500, ['500', 'run this again later']),
])
def test_refused_upload(client, server, folder, step, status, words):
    server.faults.append(Fault(step, status, headers={'Retry-After': '7'} if status == 429 else {}))
    client.send(folder).refused(*words)
    assert not published(server)
    server.recover()
    client.send(folder).ok()
    assert len(server.commits(REPO)) == 2


def test_passing_faults_are_outlasted(client, server, folder):
    """The client retries, and waits as long as the Hub requests."""
    server.faults += [Fault('POST .*/preupload/', 429, 1, {'Retry-After': '7'}), Fault('PUT /lfs/', 500, 2)]
    done = client.send(folder).ok()
    assert any(7 <= w <= 8 for w in done.waits), done.waits
    assert len(server.commits(REPO)) == 2


def test_wrong_or_no_token(client, server, final):
    client.push(final, HF_TOKEN='hf_wrong').refused('does not accept the token', 'HF_TOKEN')
    client.push(final, HF_TOKEN='').refused('no token', 'hf auth login')
    assert not server.repositories


def test_someone_else_commits_in_between(client, server, folder):
    """The commit names its parent, so the Hub refuses it once the branch has moved."""
    client.send(folder).ok()
    server.repositories[REPO].branches['main'].pop()
    server.hooks['POST .*/preupload/'] = lambda: server.put(REPO, {'README.md': b'of someone else'})
    client.send(folder).refused('412', 'run this again')
    server.hooks.clear()
    assert server.commits(REPO)[-1].message == 'put'
    client.send(folder).ok()


def test_card_that_the_hub_rejects(client, server, final):
    server.faults.append(Fault('POST /api/validate-yaml', 400))
    client.push(final).refused('rejects the front matter')
    assert not server.repositories


@pytest.mark.parametrize('file', ['config.json', 'model.safetensors'])
@pytest.mark.parametrize('how, words', [
    ('truncate', ['cannot be read']), ('corrupt', ['damaged']), (500, ['500', 'later']), (403, ['403', 'token']),
    (404, ['holds no']), ('down', ['cannot be reached']),
])
def test_download_fails_then_succeeds(client, server, built, file, how, words):
    server.put(REPO, built)
    headers = {'X-Error-Code': 'EntryNotFound'} if how == 404 else {}
    server.faults.append(Fault(f'(GET|HEAD) .*resolve/.*{file}', how, headers=headers))
    client.load().refused(file, *words)
    server.recover()
    assert 'loaded 3' in client.load().ok().out


HASTY = "import timm_multiexit.pretrained.hub_files as hub\nhub._silent.clear()\nhub.TIMEOUT = 0.3\n"
LOAD = (f"from timm_multiexit import load_exit_config, load_model\nmodel = load_model('hf-hub:{REPO}')\n"
        f"print('loaded', model.num_exits, load_exit_config('hf-hub:{REPO}').num_exits)\n")
PATIENT = 'hub._silent.clear()\nhub.TIMEOUT = 10.\n'


@pytest.mark.parametrize('how', ['hang', 'down'])
def test_the_cache_answers_where_the_hub_does_not(client, server, built, how):
    """A Hub that never answers costs one wait, not one a file; without a cache it is an error that says so."""
    server.put(REPO, built)
    assert 'loaded 3 3' in client.code(HASTY + LOAD + PATIENT).ok().out
    server.faults.append(Fault('.', how))
    server.requests.clear()
    done = client.code(HASTY + LOAD + PATIENT).ok()
    assert 'loaded 3 3' in done.out and len(server.requests) <= 1
    client.clear_cache()
    client.code(HASTY + LOAD).refused('config.json', 'cannot be reached', 'not in the cache', 'run this again')
    server.recover()
    assert 'loaded 3 3' in client.code(HASTY + LOAD + PATIENT).ok().out


@pytest.mark.parametrize('how, words', [(500, ['500', 'later']), (404, ['no such repository']), ('down', ['reached'])])
def test_recipe_that_cannot_be_fetched_is_not_taken_for_none(client, server, built, how, words):
    """Otherwise thresholds would be calibrated on images that the weights were trained on."""
    code = ('from timm_multiexit.pretrained.exit_config import load_recipe\n'
            f"print(load_recipe('hf-hub:{REPO}').get('model'))\n")
    server.put(REPO, built)
    server.faults.append(Fault('(GET|HEAD) .*resolve/.*recipe.yaml', how))
    client.code(code).refused('recipe.yaml', *words)
    server.recover()
    assert 'msfuse_cifar' in client.code(code).ok().out
    server.put(REPO, {name: content for name, content in built.items() if name != 'recipe.yaml'})
    client.clear_cache()
    assert 'None' in client.code(code).ok().out


@pytest.mark.parametrize('change, words', [
    ('pickle', ['model.safetensors', 'pickled weights']), ('pickle named', ['pickled weights']),
    ('corrupt', ['cannot be loaded']), ('other network', ['do not fit']), ('unknown', ['does not know']),
    ('no exits', ['has no exits']), ('no config', ['config.json']), ('not JSON', ['config.json']),
])
@pytest.mark.parametrize('place', ['hf-hub', 'local-dir'])
def test_repository_that_cannot_be_loaded(client, server, final, built, tmp_path, change, words, place):
    files = dict(built)
    config = json.loads(files['config.json'])
    if change.startswith('pickle'):
        path = tmp_path / 'weights.bin'
        torch.save({k: v.float() for k, v in load_file(final / 'model.safetensors').items()}, path)
        files['pytorch_model.bin'] = path.read_bytes()
        if change == 'pickle named':
            config['pretrained_cfg']['hf_hub_filename'] = 'pytorch_model.bin'
        if place == 'local-dir' or change == 'pickle':
            del files['model.safetensors']
    elif change == 'corrupt':
        files['model.safetensors'] = files['model.safetensors'][:5000]
    elif change == 'other network':
        config['model_args']['growth'] = 6
    elif change == 'unknown':
        config['architecture'] = 'nonsense_net'
    elif change == 'no exits':
        config = dict(architecture='test_vit', num_classes=10, pretrained_cfg=dict(config['pretrained_cfg']))
        vit = timm.create_model('test_vit', num_classes=10)
        save_file(vit.state_dict(), tmp_path / 'vit.safetensors')
        config['pretrained_cfg'].update(
            input_size=[3, 160, 160], first_conv='patch_embed.proj', classifier='head', tag='r160_in1k')
        files['model.safetensors'] = (tmp_path / 'vit.safetensors').read_bytes()
    files['config.json'] = json.dumps(config).encode()
    if change == 'no config':
        del files['config.json']
    elif change == 'not JSON':
        files['config.json'] = b'{"architecture": '
    where = write_and_name(server, tmp_path, place, files)
    client.load(where).refused(*words)
    assert 'loaded 3' in client.load(write_and_name(server, tmp_path, place, built)).ok().out


def write_and_name(server, tmp_path: Path, place: str, files: dict) -> str:
    if place == 'hf-hub':
        server.put(REPO, files)
        return f'hf-hub:{REPO}'
    folder = tmp_path / 'local'
    shutil.rmtree(folder, ignore_errors=True)
    return f'local-dir:{write(folder, files)}'


@pytest.mark.parametrize('change, words', [
    ('no results', ['results.json', 'timm-multiexit evaluate']),
    ('no policies', ['multiexit.json', 'timm-multiexit calibrate']),
    ('no weights', ['model.safetensors', 'train_timm.py']), ('corrupt weights', ['cannot be loaded']),
    ('other weights', ['do not fit']), ('other results', ['another network']),
    ('other policies', ['costs in multiexit.json']), ('recipe', ['names no model']), ('folder data', ['--name']),
])
def test_folder_that_cannot_be_published(client, server, final, tmp_path, change, words):
    folder = copy_of(final, tmp_path)
    recipe = yaml.safe_load((folder / 'recipe.yaml').read_text())
    missing = {'no results': 'results.json', 'no policies': 'multiexit.json', 'no weights': 'model.safetensors'}
    if change in missing:
        (folder / missing[change]).unlink()
    elif change == 'corrupt weights':
        weights = folder / 'model.safetensors'
        weights.write_bytes(weights.read_bytes()[:5000])
    elif change == 'other weights':
        config = json.loads((folder / 'config.json').read_text())
        config['model_args']['growth'] = 6
        write_json(folder / 'config.json', config)
    elif change in ('other results', 'other policies'):
        path = folder / ('results.json' if change == 'other results' else 'multiexit.json')
        content = json.loads(path.read_text())
        if change == 'other results':
            content['exits'][0]['macs'] += 1
        else:
            content['exit_macs'][0] += 1
        write_json(path, content)
    elif change == 'recipe':
        del recipe['model']
    elif change == 'folder data':
        recipe['dataset'] = 'folder'
    (folder / 'recipe.yaml').write_text(yaml.safe_dump(recipe))
    client.push(folder, '--dry-run').refused(*words)


def test_unknown_names(client):
    client.push('msfuse_cifra.cifar10').refused("did you mean msfuse_cifar?")
    client.push('no/such/folder').refused('is not a folder')
    client.push('vgg8_mc_cifar.cifar100', '--dry-run').refused('holds no weights')
