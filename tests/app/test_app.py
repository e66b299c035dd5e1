"""The app's pure functions: which exit answers, positions in the pictures, and stored files."""
import math
import time
from pathlib import Path

import numpy
import pytest
import torch
import yaml
from app_pages import MACS, Tree, make_config
from PIL import Image

from timm_multiexit.errors import InputError
from timm_multiexit.evaluation.evaluate import LabelledLogits
from timm_multiexit.inference.images import check_sent
from timm_multiexit.stopping.costs import ExitCosts
from timm_multiexit.stopping.policy import ExitPolicy
from timm_multiexit.stopping.simulate import simulate

pytest.importorskip('gradio', reason="the app needs gradio: pip install 'timm-multiexit[app]'")

import choose_examples  # noqa: E402
import dataset_view  # noqa: E402
import examples  # noqa: E402
import gradio as gr  # noqa: E402
import handlers  # noqa: E402
import image_view  # noqa: E402
import served  # noqa: E402
from answers import (  # noqa: E402
    ExitOutputs,
    answer_by_confidence,
    answer_within_budget,
    answer_within_time,
    describe,
    status_text,
)


def make_outputs(logits=None, **kwargs) -> ExitOutputs:
    if logits is None:  # predicts 0, 0, 1, 1, with rising confidence
        logits = torch.tensor([[1., 0., 0.], [2., 1., 0.], [1., 3., 0.], [0., 6., 0.]])
    values = dict(
        network='net.data', logits=logits, labels=('cat', 'dog', 'pickup_truck'),
        costs=ExitCosts(MACS, (1, 2, 3, 4), (3, 32, 32)),
        milliseconds=(1., 2., 2.5, 4.), temperatures=(1., 1., 2., 0.5), input_image=Image.new('RGB', (32, 32), 'navy'),
        true_class='dog')
    return ExitOutputs(**{**values, **kwargs})


@pytest.mark.parametrize('budget, exit_index', [
    (10e6, 0), (19.99e6, 0), (20e6, 1), (24e6, 2), (39.9e6, 2), (40e6, 3), (1e30, 3), (math.inf, 3)])
def test_the_deepest_exit_within_a_budget_answers(budget, exit_index):
    assert answer_within_budget(make_outputs(), budget).exit_index == exit_index


@pytest.mark.parametrize('budget', [0, -1e6, 9.99e6, math.nan, None, 'much'])
def test_invalid_budgets(budget):
    with pytest.raises(InputError, match='below the first exit|give a number'):
        answer_within_budget(make_outputs(), budget)


def test_a_larger_budget_never_answers_earlier():
    outputs = make_outputs()
    exits = [answer_within_budget(outputs, 1e5 * b).exit_index for b in range(100, 420)]
    assert exits == sorted(exits) and set(exits) == {0, 1, 2, 3}


@pytest.mark.parametrize('milliseconds, exit_index', [(1., 0), (2., 1), (2.49, 1), (3.99, 2), (4., 3), (math.inf, 3)])
def test_the_deepest_exit_that_is_reached_in_time_answers(milliseconds, exit_index):
    answer = answer_within_time(make_outputs(), milliseconds)
    assert answer.exit_index == exit_index and ('whole network' in answer.reason) == (exit_index == 3)


@pytest.mark.parametrize('milliseconds', [0, 0.99, -1., math.nan, None, 'soon'])
def test_invalid_times(milliseconds):
    with pytest.raises(InputError, match='the first exit takes 1.00 ms|give a number'):
        answer_within_time(make_outputs(), milliseconds)


@pytest.mark.parametrize('calibrated', [True, False])
def test_confidence_mode_is_the_policy_of_the_package(calibrated):
    torch.manual_seed(0)
    for _ in range(20):
        outputs = make_outputs(torch.randn(4, 3) * 2)
        temperatures = outputs.temperatures if calibrated else (1.,) * 4
        for threshold in (0.4, 0.7, 0.9, 1.):
            policy = ExitPolicy.at_confidence(threshold, temperatures)
            expected = simulate(policy, outputs.logits.unsqueeze(1), MACS).exit_index.item()
            answer = answer_by_confidence(outputs, threshold, calibrated)
            assert answer.exit_index == expected
            reached = outputs.probabilities(calibrated)[expected].max() >= threshold
            assert ('No exit reaches' in answer.reason) == (not reached)


@pytest.mark.parametrize('threshold', [0, -0.1, 1.01, math.nan, None, 'sure'])
def test_invalid_confidences(threshold):
    with pytest.raises(InputError, match='give a'):
        answer_by_confidence(make_outputs(), threshold)


def test_limits_are_texts_too():
    outputs = make_outputs()
    for limit in (0.6, 0.9):
        assert answer_by_confidence(outputs, str(limit)) == answer_by_confidence(outputs, limit)
    assert answer_within_budget(outputs, '24e6') == answer_within_budget(outputs, 24e6)


def test_describe_marks_what_ran():
    outputs = make_outputs(notes=('shrunk',))
    values = describe(outputs, answer_within_budget(outputs, 24e6))
    assert (values['exit'], values['num_exits'], values['label'], values['macs']) == (3, 4, 'dog', 24_000_000)
    assert [e['ran'] for e in values['exits']] == [True, True, True, False]
    assert values['share_of_full_cost'] == 0.6 and values['notes'] == ['shrunk']
    for row, p in zip(values['exits'], outputs.probabilities()):
        assert sum(t['probability'] for t in row['top']) == pytest.approx(1., abs=1e-4)
        assert row['top'][0]['probability'] == pytest.approx(float(p.max()), abs=1e-4)


def test_status_text_is_spoken():
    outputs = make_outputs(true_class='pickup_truck')
    assert status_text(outputs, answer_within_budget(outputs, 10e6)) == (
        'Exit 1 of 4 answers cat with 58% confidence; the true class is pickup truck. 75% of the compute saved.')


def test_exit_states():
    assert image_view.exit_states(4, 0) == ['answered', 'not-run', 'not-run', 'not-run']
    assert image_view.exit_states(4, 2) == ['ran', 'ran', 'answered', 'not-run']
    assert image_view.exit_states(1, 0) == ['answered']


@pytest.mark.parametrize('macs', [MACS, (1,), (15, 31, 44, 50, 60, 63, 89, 94), tuple(range(100, 120)), (98, 99, 100)])
@pytest.mark.parametrize('gap', [0., 0.05, 0.2, 0.9])
def test_exit_positions(macs, gap):
    positions = image_view.exit_positions(macs, gap)
    steps = [b - a for a, b in zip([0., *positions], positions)]
    assert positions[-1] == pytest.approx(1.)
    assert min(steps) >= min(gap, 1. / len(macs)) - 1e-5 and min(steps) > 0.
    if gap == 0.:
        assert positions == pytest.approx([m / macs[-1] for m in macs], abs=1e-5)
    ends = [image_view.at_cost(m, macs, positions) for m in macs]
    assert ends == pytest.approx(positions)
    costs = [image_view.at_cost(macs[-1] * i / 50, macs, positions) for i in range(60)]
    assert costs == sorted(costs) and costs[0] == 0. and costs[-1] == 1.


@pytest.mark.parametrize('mode', ['budget', 'time', 'confidence'])
def test_the_picture_shows_states_and_marks(mode):
    outputs = make_outputs()
    answer = dict(budget=lambda: answer_within_budget(outputs, 21e6), time=lambda: answer_within_time(outputs, 2.2),
                  confidence=lambda: answer_by_confidence(outputs, 0.6))[mode]()
    assert answer.exit_index == 1
    tree = Tree(image_view.anytime_view(outputs, answer))
    exits = [c for c in tree.classes('li') if c.startswith('exit ')]
    assert exits == ['exit ran', 'exit answered', 'exit not-run', 'exit not-run']
    assert tree.tags[0][1]['data-exit'] == '2'
    assert ('flag' in ' '.join(tree.classes('div'))) == (mode != 'confidence')
    assert 'Exit 2 of 4 answers' in tree.text and 'True class: dog' in tree.text and '50%' in tree.text
    assert [c.split()[1] for c in tree.classes('span') if c.startswith('mark ')][:3] == ['wrong', 'wrong', 'wrong']


def test_labels_are_escaped():
    evil = '<img src=x onerror=alert(1)>'
    outputs = make_outputs(labels=(evil, evil, evil), true_class=evil, notes=(evil,))
    views = image_view.anytime_view(outputs, answer_within_budget(outputs, 40e6)) + image_view.example_cards(
        [examples.Example(outputs.input_image, evil, evil)], 0)
    assert '<img src=x' not in views
    Tree(views)


def test_cards_are_grouped_by_lesson():
    image = Image.new('RGB', (32, 32))
    shown = [examples.Example(image, *texts) for texts in (('cat', 'b'), ('dog', 'b'), ('cat', 'a'))]
    tree = Tree(image_view.example_cards(shown, 1))
    buttons = [attrs for tag, attrs in tree.tags if tag == 'button']
    assert [b['data-index'] for b in buttons] == ['0', '1', '2']
    assert [b['aria-pressed'] for b in buttons] == ['false', 'true', 'false']
    assert [attrs['aria-label'] for _, attrs in tree.tags if attrs.get('role') == 'group'] == ['b', 'a']


def test_links_hold_the_state():
    outputs = make_outputs(example=2)
    assert 'href="?network=net.data&amp;image=3&amp;stop=budget&amp;at=21.5"' in image_view.anytime_view(
        outputs, answer_within_budget(outputs, 21.5e6))
    assert 'at=0.5&amp;raw=1"' in image_view.anytime_view(outputs, answer_by_confidence(outputs, 0.5, calibrated=False))
    assert 'href=' not in image_view.anytime_view(make_outputs(), answer_within_budget(outputs, 21e6))


@pytest.mark.parametrize('p, text', [(0., '0%'), (0.574, '57%'), (0.996, '>99%'), (1., '100%')])
def test_percent(p, text):
    assert image_view.percent(p) == text


@pytest.mark.parametrize('macs', [(15_260_000, 64_220_000), (7_420_000, 52_650_000), (615_000_000, 3_240_000_000),
                                  (100_000, 150_000), (5_000_000, 5_000_000)])
def test_the_slider_reaches_every_exit(macs):
    low, high, step = handlers.slider_range(macs)
    assert macs[0] <= low * 1e6 < macs[0] + 1.0001e6 * step and macs[1] <= high * 1e6 < macs[1] + 1.0001e6 * step
    assert (high - low) / step <= 101


@pytest.mark.parametrize('high', [0.5, 50, 4000])
def test_an_axis_has_a_few_round_labels(high):
    ticks = dataset_view._ticks(0.1 * high, high, 5)
    assert 3 <= len(ticks) <= 6 and all(float(f'{tick:.1g}') == pytest.approx(tick) for tick in ticks)


def test_a_file_of_another_network_is_not_shown():
    outputs = make_outputs()
    assert handlers.accept_file('other.data', outputs) == (gr.skip(), gr.skip())


def test_display_names():
    assert served.display_name('msfuse_cifar.cifar10') == 'CIFAR-10 · msfuse_cifar'
    assert served.display_name('msfuse_cifar.flowers') == 'flowers · msfuse_cifar'
    assert served.display_name('hf-hub:a/b.c') == 'hf-hub:a/b.c'


@pytest.mark.parametrize('name', ['no_such_net', 'resnet18', 'vgg8_mc_cifar'])
def test_networks_without_weights_are_not_listed(name):
    assert name not in [n.partition('.')[0] for n in served.available_networks()]
    with pytest.raises(InputError):
        served.available_networks(name)


def test_lessons_select_the_images_they_describe():
    def confident(*predictions):  # logits of 6 exits
        return torch.stack([8. * torch.eye(4)[c] for c in predictions])

    paths = {'Correct from the start': (0,) * 6, 'Correct only late': (1, 1, 1, 1, 0, 0),
             'Changes its mind': (0, 1, 0, 1, 0, 1), 'Never correct': (3,) * 6}
    probabilities = torch.stack([confident(*p) for p in paths.values()], 1).softmax(2)
    scores = choose_examples.lessons(probabilities, torch.zeros(4, dtype=torch.long))
    for i, lesson in enumerate(paths):
        shown = [name for name, score in scores.items() if score[i] > -math.inf]
        assert shown == [lesson]


def test_examples_are_of_many_classes():
    scores = {'a': torch.tensor([9., 8., 7., -math.inf]), 'b': torch.tensor([1., 2., 3., 4.]),
              'c': torch.full((4,), -math.inf)}
    chosen = choose_examples.choose(scores, torch.tensor([0, 0, 1, 2]))
    assert [(c['index'], c['lesson']) for c in chosen] == [(0, 'a'), (2, 'a'), (3, 'b'), (2, 'b')]


def test_assets_are_written_and_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(examples, 'ASSETS', tmp_path)
    torch.manual_seed(2)
    targets = torch.randint(3, (300,))
    logits = torch.randn(4, 300, 3) + 2. * torch.eye(3)[targets]
    images = torch.randint(256, (300, 3, 32, 32), dtype=torch.uint8)
    config = make_config()
    choose_examples.make_assets('net.data', config.class_names, config, images, LabelledLogits(logits, targets))
    assets = examples.load_assets('net.data', config.class_names)
    assert {e.lesson for e in assets.examples} >= {'Correct from the start', 'Correct only late'}
    for example in assets.examples:
        pixels = torch.from_numpy(numpy.array(example.image))
        assert torch.equal(pixels.permute(2, 0, 1), images[example.index])
        assert example.true_class == config.class_names[targets[example.index]]
    assert len(assets.gallery) == choose_examples.GALLERY and len(assets.reliability) == 4
    totals = [sum(g.confidences) for g in assets.gallery]
    assert totals == sorted(totals, reverse=True)
    for row in assets.reliability:
        for values in row.values():
            assert sum(b['share'] for b in values['bins']) == pytest.approx(1., abs=1e-3)


def test_the_samples_stand_in_for_missing_examples(monkeypatch):
    assets = examples.load_assets('net.nothing', ('cat', 'ship'))
    assert {e.true_class for e in assets.examples} == {'cat', 'ship', None} and assets.gallery == ()
    monkeypatch.setattr(handlers, 'stored_for', lambda name: (network, assets, None))
    network = handlers.get_network('msfuse_cifar_budgeted.cifar10')
    cards = handlers.cards('net.nothing', 0)
    for position, example in enumerate(assets.examples):
        assert handlers.run_example('net.nothing', position).true_class == example.true_class
        assert (example.true_class or f'image {example.index}') in cards


def test_the_samples_stand_in_where_no_image_teaches_a_lesson(tmp_path, monkeypatch):
    monkeypatch.setattr(examples, 'ASSETS', tmp_path)
    config = make_config()
    logits = torch.eye(3)[torch.tensor([0, 0, 1, 1])].unsqueeze(1).repeat(1, 5, 1)  # right, then wrong
    images = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8)
    choose_examples.make_assets('net.data', config.class_names, config, images,
                                LabelledLogits(logits, torch.zeros(5, dtype=torch.long)))
    assets = examples.load_assets('net.data', config.class_names)
    assert len(assets.gallery) == 5 and {e.lesson for e in assets.examples} == {''}
    assert len(assets.examples) == len(list(examples.SAMPLES.glob('*.png')))


@pytest.mark.parametrize('text, position', [('1', 0), ('8', 7), ('9', 0), ('0', 0), ('-1', 0), ('x', 0), (None, 0)])
def test_positions_in_links(text, position):
    assert examples.parse_position(text, 8) == position


@pytest.mark.parametrize('args, message', [
    (['--model', 'no_such_net'], "unknown network 'no_such_net'"),
    (['--model', 'resnet18'], 'has no exits'),
    (['--model', 'local-dir:/no/such/folder'], 'cannot be read')])
def test_bad_arguments_of_the_command(args, message, capsys):
    import app
    assert app.main(args) == 2
    assert message in capsys.readouterr().err


def test_mcp_without_its_package_is_an_error(monkeypatch, capsys):
    import app
    find_spec = app.importlib.util.find_spec
    monkeypatch.setattr(app.importlib.util, 'find_spec', lambda name: None if name == 'mcp' else find_spec(name))
    assert app.main(['--mcp']) == 2
    assert 'gradio[mcp]' in capsys.readouterr().err


def test_the_front_matter_names_the_networks_with_weights():
    text = (Path(examples.__file__).parent / 'README.md').read_text(encoding='utf-8')
    models = yaml.safe_load(text.split('---')[1])['models']
    assert sorted(m.rpartition('/')[2] for m in models) == sorted(served.available_networks())


# Strangers


@pytest.mark.parametrize('name', ['local-dir:/etc', 'hf-hub:anyone/anything', 'resnet18', '../x', '', None, ['a'], {}])
def test_only_served_networks_are_named(name, monkeypatch):
    """Any other name would make the server read its disk or download from strangers."""
    monkeypatch.setattr(served, 'Network', None)
    with pytest.raises(InputError, match='choose one of') as raised:
        served.get_network(name)
    assert '\n' not in str(raised.value)


@pytest.mark.parametrize(
    'budget', ['1' + ' ' * 40_000 + 'x', ' ' * 100_000, None, ['30M'], {'a': 1}, b'30M', 'x', '-1'],
    ids=lambda budget: str(budget)[:8])
def test_budgets_of_strangers_are_short_texts(budget):
    name = served.get_network(served.available_networks()[0]).name
    start = time.perf_counter()
    with pytest.raises(gr.Error):
        handlers.policy(name, budget)
    assert time.perf_counter() - start < 1


def test_strangers_send_photos(tmp_path):
    for name, image in {
            'deep.png': Image.new('I;16', (4001, 4000)), 'flat.png': Image.new('1', (4001, 4000)),
            'photo.eps': Image.new('RGB', (8, 8)), 'photo.tiff': Image.new('RGB', (8, 8)),
            'photo.gif': Image.new('RGB', (8, 8)),
            'photo.jpg': Image.new('L', (8001, 8000)), 'strip.png': Image.new('L', (1, 900_000))}.items():
        image.save(tmp_path / name)
        with pytest.raises(InputError, match='too many|not an image|long and thin'):
            check_sent(str(tmp_path / name))
    for name in ('photo.jpg', 'photo.png', 'photo.webp', 'photo.bmp'):
        Image.new('RGB', (64, 32)).save(tmp_path / name)
        check_sent(str(tmp_path / name))
    (tmp_path / 'text.png').write_text('no image')
    with pytest.raises(InputError, match='not an image'):
        check_sent(str(tmp_path / 'text.png'))

