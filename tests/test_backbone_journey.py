"""The README's commands for exits on a timm model: from a folder of photos to the demo, 500 images of four classes."""
import json
import re
import runpy
import shlex

import push
import pytest
from conftest import PROJECT
from served import Network, available_networks
from torchvision.datasets import CIFAR10

from timm_multiexit import exit_costs, load_model
from timm_multiexit.cli import main
from timm_multiexit.evaluation.results import Results
from timm_multiexit.inference.images import read_image

SECTION = re.compile(r'^## Exits on any timm model\n.*?```bash\n(.*?)```', re.MULTILINE | re.DOTALL)
CLASSES = ('automobile', 'frog', 'horse', 'ship')


@pytest.fixture(scope='module')
def photos(tmp_path_factory, cifar_root):
    root = tmp_path_factory.mktemp('photos')
    for split, count in (('train', 100), ('test', 25)):
        dataset = CIFAR10(cifar_root, train=split == 'train')
        for name in CLASSES:
            folder = root / split / name
            folder.mkdir(parents=True)
            chosen = [i for i, t in enumerate(dataset.targets) if dataset.classes[t] == name][:count]
            for i in chosen:
                dataset[i][0].save(folder / f'{i:05d}.jpg', quality=95)
    return root


def commands(photos, output, backbone):
    """The README's, on the CPU, with a small backbone whose weights need no download."""
    text = SECTION.search((PROJECT / 'README.md').read_text(encoding='utf-8'))[1].replace('\\\n', ' ')
    for line in text.strip().splitlines():
        words = shlex.split(line, comments=True)
        words = [word.replace('PHOTOS', str(photos)).replace('output/exits', f'{output}/exits') for word in words]
        if 'train_timm.py' in words:
            start = words.index('--model-kwargs') + 1
            words[start:start + 1] = backbone
            words.remove('--pretrained')
            words += ['--output', str(output), '--epochs', '4', '--batch-size', '20', '--input-size', '64',
                      '--threads', '1', '--device', 'cpu']
        elif 'benchmark' in words:
            words += ['--rounds', '1', '--images', '20', '--batch-size', '10', '--threads', '1']
        elif 'classify' in words:
            words += ['--json']
        yield [word.replace('plain', f'{output}/plain') if word == 'plain' else word for word in words]


@pytest.mark.slow('100 s of CPU time each: eight commands, training among them')
@pytest.mark.parametrize('backbone', [
    ['backbone=vit_tiny_patch16_224', 'img_size=64'], ['backbone=mobilevit_xxs']], ids=['transformer', 'hybrid'])
def test_from_photos_to_the_demo(photos, tmp_path, backbone, capsys):
    final, ran = tmp_path / 'exits' / 'final', {}
    for words in commands(photos, tmp_path, backbone):
        words = [_half(final) if word == '2G' else word for word in words]
        program, *rest = words[1:] if words[0] == 'python' else words
        if program == 'app/app.py':
            assert rest == ['--model', f'local-dir:{final}']
            continue
        if program == 'train_timm.py':
            runpy.run_path(str(PROJECT / program))['main'](rest)
        else:
            assert (push.main if program == 'hub/push.py' else main)(rest) == 0, words
        ran[program if program != 'timm-multiexit' else rest[0]] = capsys.readouterr().out
    assert list(ran) == ['train_timm.py', 'calibrate', 'evaluate', 'benchmark', 'classify', 'hub/push.py', 'detach']
    evaluated = Results.load(final / 'results.json')
    assert evaluated.test_images == 100 and evaluated.exits[-1].accuracy > 40  # chance is 25
    answers = json.loads(ran['classify'])
    assert len(answers) == 100 and {answer['label'] for answer in answers} <= set(CLASSES)
    assert 'multiexit.mine' in ran['hub/push.py'] and 'model.safetensors' in ran['hub/push.py']

    name = f'local-dir:{final}'
    assert available_networks(name)[0] == name
    available_networks()  # as before
    network, photo = Network(name), sorted((photos / 'test').rglob('*.jpg'))[0]
    outputs = network.run(read_image(photo, 64)[0])
    assert network.labels == CLASSES and network.config is not None and outputs.logits.shape == (4, 4)


def _half(final):
    """A budget of half of the network's cost, as one would give 2G for a ResNet-50."""
    macs = exit_costs(load_model(checkpoint=final)).macs
    return f'{(macs[0] + macs[-1]) / 2e6:.2f}M'
