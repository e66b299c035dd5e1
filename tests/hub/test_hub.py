"""hub/push.py and loading from the Hub, with the real client against a small Hub on a real socket."""
import json
import re
import shutil
from dataclasses import replace

import numpy
import push
import pytest
import timm
import yaml
from card import build_card
from conftest import PROJECT
from hub_server import HubServer
from hub_support import NAME, PUSH, REPO, SHAPE, copy_of
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from model_repo import read_network
from publication import build_folder
from safetensors.torch import load_file, save_file
from space_repo import build_space
from upload import check_private

from timm_multiexit.errors import InputError
from timm_multiexit.models._pretrained import WEIGHTS_DIR
from timm_multiexit.pretrained.names import list_networks
from timm_multiexit.stopping.config import ExitConfig
from timm_multiexit.training.history import History, Parent, Step

pytest_plugins = ['hub_support']  # its fixtures


def test_push_load_back_and_push_again(client, server, final):
    done = client.push(final).ok()
    assert f'{REPO}: published' in done.out and HubServer.token not in done.out + done.err
    first, commit = server.commits(REPO)
    assert not first.files and set(commit.files) == {
        'README.md', 'anytime.png', 'budgeted.png', 'config.json', 'history.csv', 'history.yaml', 'model.safetensors',
        'multiexit.json', 'recipe.yaml', 'results.json', 'scores.safetensors'}
    stored = server.contents(REPO)
    assert stored['model.safetensors'] == (final / 'model.safetensors').read_bytes()
    config = json.loads(stored['config.json'])
    assert config['architecture'] == 'msfuse_cifar' and config['pretrained_cfg']['tag'] == 'cifar10'
    assert config['multiexit']['dataset'] == 'torch/cifar10'
    assert json.loads(stored['multiexit.json']) == ExitConfig.load(final / 'multiexit.json').to_dict()
    assert stored['scores.safetensors'] == (final / 'scores.safetensors').read_bytes()
    for text in ('README.md', 'config.json', 'recipe.yaml', 'results.json'):
        assert str(final).encode() not in stored[text] and b'/somewhere/of/mine' not in stored[text]

    again = client.push(final).ok()
    assert 'unchanged, no commit made' in again.out
    assert len(server.commits(REPO)) == 2

    client.code(f"""
import timm, torch
from timm_multiexit import ExitConfig, load_exit_config
torch.manual_seed(1)
x = torch.randn(2, 3, 32, 32)
ours = timm.create_model('msfuse_cifar', **{SHAPE}).eval()
from safetensors.torch import load_file
ours.load_state_dict(load_file('{final}/model.safetensors'))
theirs = timm.create_model('hf-hub:{REPO}', pretrained=True).eval()
assert all(torch.equal(a, b) for a, b in zip(ours.forward_exits(x), theirs.forward_exits(x)))
stored = ExitConfig.load('{final}/multiexit.json')
assert load_exit_config('hf-hub:{REPO}') == stored
assert load_exit_config('hf-hub:{REPO}@{commit.oid}') == stored
other = timm.create_model('hf-hub:{REPO}', pretrained=True, num_classes=4, in_chans=1).eval()
assert [l.shape for l in other.forward_exits(x[:, :1])] == [(2, 4)] * 3
kept, name = theirs.state_dict(), 'stages.1.layers.0.'
same = [torch.equal(v, kept[k]) for k, v in other.state_dict().items() if k.startswith(name)]
assert same and all(same)
""").ok()


def test_new_weights_make_one_commit_and_other_files_stay(client, server, final, built, tmp_path):
    server.put(REPO, {**built, '.gitattributes': b'*.png filter=lfs', 'old.txt': b'stale'})
    changed = copy_of(final, tmp_path)
    state = load_file(changed / 'model.safetensors')
    state['exits.0.fc.bias'] += 1
    save_file(state, changed / 'model.safetensors')
    shown = client.push(changed, '--dry-run').ok().out
    assert re.search(r'replace .* model.safetensors', shown) and re.search(r'leave .* old.txt', shown)
    assert re.search(r'keep .* config.json', shown) and 'to upload: 1 files' in shown
    before = len(server.commits(REPO))
    client.push(changed).ok()
    assert len(server.commits(REPO)) == before + 1
    now = server.contents(REPO)
    assert now['old.txt'] == b'stale' and '.gitattributes' in now
    assert now['model.safetensors'] == (changed / 'model.safetensors').read_bytes()


def test_a_second_revision_beside_main(client, server, final, built, tmp_path):
    server.put(REPO, built)
    changed = copy_of(final, tmp_path)
    config = ExitConfig.load(changed / 'multiexit.json')
    fewer = config.scores.subset(numpy.arange(100))
    replace(config, scores=fewer).save(changed / 'multiexit.json')
    client.push(changed, '--revision', 'trial').ok()
    assert len(server.commits(REPO)) == 2 and len(server.commits(REPO, 'trial')) == 3
    client.code(f"""
from timm_multiexit import load_exit_config
assert load_exit_config('hf-hub:{REPO}').scores.num_images == 300
assert load_exit_config('hf-hub:{REPO}@trial').scores.num_images == 100
""").ok()
    client.load(f'hf-hub:{REPO}@trial').ok()
    client.load(f'hf-hub:{REPO}@none').refused('no such revision', 'none')


def test_snapshot_and_offline_from_the_cache(client, server, built):
    server.put(REPO, built)
    client.load().ok()
    client.code(f"""
from huggingface_hub import snapshot_download
from timm_multiexit.pretrained.load import load_model
from timm_multiexit import load_exit_config
folder = snapshot_download('{REPO}')
assert load_model('local-dir:' + folder).num_exits == 3
assert load_exit_config('local-dir:' + folder) == load_exit_config('hf-hub:{REPO}')
""").ok()
    server.requests.clear()
    client.load().ok()
    assert not [r for r in server.requests if r.startswith('GET') and 'model.safetensors' in r]  # from the cache
    server.stop()
    assert 'loaded 3' in client.load().ok().out


def test_a_fresh_process_offline_and_without_the_import(client, server, built):
    """Both need a process of their own: HF_HUB_OFFLINE is read on import, and timm alone knows no msfuse_cifar."""
    server.put(REPO, built)
    client.load().ok()
    server.requests.clear()
    done = client.fresh(f"""
import shutil, timm
try:
    timm.create_model('hf-hub:{REPO}', pretrained=True)
except RuntimeError as error:
    print(error)
from timm_multiexit import InputError, load_model
print(timm.create_model('hf-hub:{REPO}', pretrained=True).num_exits, load_model('hf-hub:{REPO}').num_exits)
shutil.rmtree('{client.home}')
try:
    load_model('hf-hub:{REPO}')
except InputError as error:
    print(error)
""", HF_HUB_OFFLINE='1')
    assert done.returncode == 0, done.stderr
    unknown, exits, refused = done.stdout.splitlines()
    assert 'Unknown model (msfuse_cifar)' in unknown and exits == '3 3' and 'HF_HUB_OFFLINE' in refused
    assert not server.requests


def test_dry_run_shows_the_changes_and_uploads_nothing(client, server, final, built):
    import hashlib
    shown = client.push(final, '--dry-run', HF_TOKEN='').ok().out
    digest = hashlib.sha256((final / 'model.safetensors').read_bytes()).hexdigest()
    size = (final / 'model.safetensors').stat().st_size
    assert re.search(rf'add +{size:,}  {digest}  model.safetensors', shown) and 'does not exist yet' in shown
    assert not server.repositories and not [r for r in server.requests if 'create' in r or 'commit/' in r]
    sent = dict(built)
    for line in shown.splitlines()[1:-1]:
        action, size, digest, path = line.split()
        content = sent.pop(path)
        assert action == 'add' and hashlib.sha256(content).hexdigest() == digest
        assert len(content) == int(size.replace(',', ''))
    assert not sent
    server.stop()
    assert 'not compared' in client.push(final, '--dry-run').ok().out


def test_private_and_name(client, server, final):
    client.push(final, '--private', '--name', 'msfuse_cifar.mine').ok()
    assert server.repositories['me/msfuse_cifar.mine'].private
    client.load('hf-hub:me/msfuse_cifar.mine').ok()
    client.clear_cache()
    client.load('hf-hub:me/msfuse_cifar.mine', HF_TOKEN='').refused('no such repository', 'HF_TOKEN')


def with_options(final, tmp_path, **options):
    """A copy whose recipe has other options."""
    folder = copy_of(final, tmp_path)
    recipe = yaml.safe_load((folder / 'recipe.yaml').read_text())
    (folder / 'recipe.yaml').write_text(yaml.safe_dump({**recipe, **options}))
    return folder


# Published networks

@pytest.mark.parametrize('name', [NAME, *list_networks(pretrained=True)])
def test_published_network(client, server, final, built, request, name):
    """The card parses, its model-index holds the measured accuracies, its snippets run; the first is not packaged."""
    packaged = request.node.callspec.indices['name'] > 0
    beside = WEIGHTS_DIR / name if packaged else final
    if packaged:
        client.push(name).ok()
    else:
        server.put(f'me/{name}', built)
    content = server.contents(f'me/{name}')
    assert content['model.safetensors'] == (beside / 'model.safetensors').read_bytes()
    text = content['README.md'].decode()
    card = ModelCard(text, ignore_metadata_errors=False)
    raw = yaml.safe_load(text.split('---')[1])
    title, measured = model_index_to_eval_results(raw['model-index'])
    results = json.loads((beside / 'results.json').read_text())
    assert title == name and [m.metric_value for m in measured] == [e['accuracy'] for e in results['exits']]
    assert raw['library_name'] == 'timm' and raw['license'] == 'apache-2.0'
    assert raw['pipeline_tag'] == 'image-classification' and raw['metrics'] == ['accuracy']
    assert raw['datasets'] == [f"uoft-cs/{name.split('.')[1]}"]
    for e in results['exits']:
        assert re.search(rf"\| {e['exit']} \| {e['macs'] / 1e6:.2f} M \|.*\| {e['accuracy']:.2f} \|", card.text)
    links = re.findall(r'\]\((?!http)(.*?)\)', card.text)
    assert links and set(links) <= set(content)
    snippets = re.findall(r'```python\n(.*?)```', card.text, re.S)
    assert len(snippets) == 5 and all(s.startswith('import timm_multiexit') for s in snippets)
    client.code('\n'.join(snippets)).ok()
    if packaged:
        client.code(f"""
import timm, torch, timm_multiexit
from timm_multiexit import load_exit_config
ours = timm.create_model('{name}', pretrained=True).eval()
theirs = timm.create_model('hf-hub:me/{name}', pretrained=True).eval()
x = torch.randn(2, 3, 32, 32)
assert all(torch.equal(a, b) for a, b in zip(ours.forward_exits(x), theirs.forward_exits(x)))
assert load_exit_config('hf-hub:me/{name}') == load_exit_config('{name}')
assert list(ours.pretrained_cfg['label_names']) == list(theirs.pretrained_cfg['label_names'])
""").ok()


def test_space(client, server, final, tmp_path):
    # Without matplotlib a network is refused, which has figures, and the Space is published.
    pushed = client.fresh(f"""
import runpy, sys
sys.modules['matplotlib'] = None
sys.path.insert(0, '{PUSH.parent}')
for what in ('{final}', '--space'):
    sys.argv = ['push.py', what, '--org', 'me']
    try:
        runpy.run_path('{PUSH}', run_name='__main__')
    except SystemExit as stop:
        print('exit code', stop.code)
""")
    assert "needs matplotlib: pip install 'timm-multiexit[plots]'" in pushed.stderr and 'Traceback' not in pushed.stderr
    assert pushed.stdout.startswith('exit code 2\nme/timm-multiexit-app: published'), pushed.stderr
    assert pushed.stdout.endswith('exit code 0\n') and set(server.repositories) == {'me/timm-multiexit-app'}
    files = server.commits('me/timm-multiexit-app')[-1].files
    assert {'README.md', 'app.py', 'requirements.txt', 'timm_multiexit/__init__.py', 'LICENSE'} <= set(files)
    assert not [f for f in files if '__pycache__' in f or f.endswith('.pyi')]
    assert server.repositories['me/timm-multiexit-app'].kind == 'space'
    requirements = server.objects[files['requirements.txt'][0]].decode()
    assert 'timm' in requirements and 'extra ==' not in requirements
    front = yaml.safe_load(server.objects[files['README.md'][0]].decode().split('---')[1])
    assert front['models'] == [f'me/{name}' for name in list_networks(pretrained=True)]
    assert front['title'] and front['app_file'] == 'app.py'
    again = build_space(tmp_path / 'again', 'me')
    assert 'unchanged' in client.send(again, 'me/timm-multiexit-app', 'space').ok().out
    assert len(server.commits('me/timm-multiexit-app')) == 2


def step(run, *parents, epochs=3, **options):
    return Step(run, list(parents), {'epochs': epochs, **options}, {'top1_mean': 90.5})


def test_the_runs_behind_the_weights_are_published(client, server, final, built, tmp_path):
    """Parents, means, intermediate checkpoints and unknown starts are listed; folders of the machine are not."""
    assert b'python train_timm.py --config recipe.yaml' in built['README.md']
    folder = with_options(final, tmp_path, epochs=0)
    w = 'model.safetensors'
    steps = [
        step('a', Parent('start.pth'), kd_checkpoint=['/somewhere/of/mine/t.safetensors']), step('b', Parent(w, 'a')),
        step('c', Parent(w, 'a'), Parent(w, 'b'), Parent(w, 'b'), epochs=0),
        step('d', Parent(w, 'c'), Parent('checkpoint-7.pth.tar', 'b', 7), epochs=0)]
    History(steps, [{'run': run, 'epoch': '0'} for run in 'abcd']).write(folder)
    client.push(folder).ok()
    stored = server.contents(REPO)
    for name in ('history.yaml', 'history.csv'):
        assert stored[name] == (folder / name).read_bytes() and f'({name})' in stored['README.md'].decode()
    assert b'somewhere' not in stored['history.yaml'] and b't.safetensors' in stored['history.yaml']
    card = stored['README.md'].decode()
    assert 'the mean of 2 sets of weights, with BN statistics' in card and '0 epochs,' not in card
    assert 'the last of 4 runs' in card
    assert [line for line in card.splitlines() if line.endswith('| 90.50 |')] == [
        '| 1 | a | `start.pth` | 3 | 90.50 |', '| 2 | b | step 1 | 3 | 90.50 |',
        '| 3 | c | mean of step 1, step 2 and step 2 | 0 | 90.50 |',
        '| 4 | d | mean of step 3 and step 2 after 8 epochs | 0 | 90.50 |']


@pytest.mark.parametrize('arch, link', [
    ('msdnet_cifar', 'https://arxiv.org/abs/1703.09844'), ('ranet_cifar', 'https://arxiv.org/abs/2003.07326')])
def test_a_paper_on_arxiv_is_linked_and_cited(final, arch, link):
    card = str(build_card(replace(read_network(str(final)), model=timm.create_model(arch)), 'me'))
    assert f']({link})\n' in card and f'url       = {{{link}}}\n}}\n```' in card


def test_the_card_names_the_processes_of_a_batch(final, tmp_path):
    for processes, named in ((1, False), (2, True)):
        folder = with_options(
            final, tmp_path / str(processes), epochs=4, batch_size=64, world_size=processes, sched='poly')
        card = str(build_card(read_network(str(folder)), 'me'))
        assert '4 epochs, ' in card and '`batch-size: 64`' in card
        assert ('`sched: poly`, in 2 processes of `torchrun`' in card) is named and ('processes' in card) is named


@pytest.mark.parametrize('names, text', [
    ('msfuse_cifar.cifar10', 'also distilled from `msfuse_cifar.cifar10`.'),
    (['a', 'b'], 'also distilled from the mean of `a` and `b`.'),
    (['a', 'a', 'b'], 'also distilled from the mean of 2 runs of `a` and `b`.'),
    (['a', 'a'], 'also distilled from the mean of 2 runs of `a`.'),
    (['a', 'b', 'c'], 'also distilled from the mean of `a`, `b` and `c`.'),
])
def test_teachers_are_named(final, tmp_path, names, text):
    folder = with_options(final, tmp_path, kd_model_name=names)
    assert text in str(build_card(read_network(str(folder)), 'me'))


def test_a_published_recipe_names_files_without_their_folders(final, tmp_path):
    files = [f'/somewhere/of/mine/{i}.safetensors' for i in range(2)] + ['c.safetensors']
    folder = with_options(final, tmp_path, kd_model_name=['a', 'b', 'c'], kd_checkpoint=files)
    recipe = build_folder(read_network(str(folder)), tmp_path / 'built', 'me') / 'recipe.yaml'
    assert yaml.safe_load(recipe.read_text())['kd_checkpoint'] == [
        '0.safetensors', '1.safetensors', 'c.safetensors']



def test_images_of_the_data_set_are_published_on_request_alone(final, tmp_path):
    folder = copy_of(final, tmp_path)
    with pytest.raises(InputError, match='has no examples.json: choose images'):
        build_folder(read_network(str(folder)), tmp_path / 'none', 'me', with_images=True)
    for name in ('examples.json', 'images.png'):
        (folder / name).write_text(name)
    for wanted in (False, True):
        built = build_folder(read_network(str(folder)), tmp_path / f'{wanted}', 'me', with_images=wanted)
        assert {(built / name).exists() for name in ('examples.json', 'images.png')} == {wanted}


@pytest.mark.parametrize('models', [[], ['msfuse_cifar.cifar10'], ['FOLDER', 'msfuse_cifar.cifar10']])
def test_images_are_not_sent_with_networks_of_the_package(models, tmp_path, capsys):
    assert push.parse_args([str(tmp_path), '--with-images']).with_images
    with pytest.raises(SystemExit) as stopped:
        push.parse_args([*(model.replace('FOLDER', str(tmp_path)) for model in models), '--with-images'])
    assert stopped.value.code == 2 and '--with-images needs MODEL to be a folder' in capsys.readouterr().err


def test_two_networks_of_one_name_are_refused(client, final):
    client.push(final, final, '--dry-run').refused('push them one at a time, with --name')


def test_only_tracked_files_make_the_space(tmp_path):
    copy = shutil.copytree(PROJECT / 'app', tmp_path / 'app')
    (copy / 'token.txt').write_text('hf_' + 'a' * 34)
    (copy / 'flagged').mkdir()
    (copy / 'flagged' / 'log.csv').write_text('a photo')
    folder = build_space(tmp_path / 'space', 'me', app=copy)
    check_private(folder)
    names = {p.relative_to(folder).as_posix() for p in folder.rglob('*')}
    assert 'app.py' in names and 'timm_multiexit/py.typed' in names and not {'token.txt', 'flagged', 'tools'} & names
    (copy / 'style.css').unlink()
    (copy / 'style.css').symlink_to(copy / 'token.txt')
    with pytest.raises(InputError, match='is a link'):
        build_space(tmp_path / 'again', 'me', app=copy)


def test_names_are_not_rendered_in_a_card(final, tmp_path):
    evil = '<img src=x onerror=alert(1)>`[x](javascript:y)|'
    folder = with_options(final, tmp_path, sched=evil, kd_model_name=evil)
    History([Step('a', [], {'epochs': 1}), Step(evil, [Parent(evil)], {'epochs': 1})]).write(folder)
    card = str(build_card(read_network(str(folder)), 'me'))
    for line in card.splitlines():
        outside = re.sub('`[^`]*`', '', line)
        assert 'onerror' not in outside or '<' not in outside
        assert '](javascript' not in outside
