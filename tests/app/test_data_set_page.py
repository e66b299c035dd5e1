"""The app's page on a whole data set: curve, gallery and thresholds under a budget."""
import re
import types

import pytest
import torch
from app_pages import MACS, Tree, make_config

from timm_multiexit import load_exit_config
from timm_multiexit.stopping.costs import format_macs
from timm_multiexit.stopping.policy import confidence
from timm_multiexit.stopping.simulate import simulate

pytest.importorskip('gradio', reason="the app needs gradio: pip install 'timm-multiexit[app]'")

import dataset_view  # noqa: E402
import examples  # noqa: E402
import gradio as gr  # noqa: E402
import handlers  # noqa: E402
import served  # noqa: E402
from answers import BY_BUDGET, BY_LOSS  # noqa: E402


def test_the_curve_interpolates_what_policies_give_on_the_validation_images():
    config = make_config()
    curve = examples.load_curve('no.results', config)
    assert curve.images == 'the validation images'
    first, last = config.policy_for(MACS[0]), config.policy_for(MACS[-1])
    assert curve.at(1.).accuracy == first.expected_accuracy and curve.at(1e12).accuracy == last.expected_accuracy
    low, high, between = curve.budgets[4], curve.budgets[5], curve.at((curve.budgets[4] + curve.budgets[5]) / 2)
    ends = [config.policy_for(b) for b in (low, high)]
    assert between.macs == pytest.approx(sum(p.expected_macs for p in ends) / 2)
    assert between.shares == pytest.approx([sum(s) / 2 for s in zip(*(p.exit_shares for p in ends))])
    low, high = dataset_view.accuracy_range(curve)
    assert low < first.expected_accuracy < last.expected_accuracy < high


def test_gallery_images_leave_where_the_policy_says():
    torch.manual_seed(1)
    logits, policy = torch.randn(4, 60, 3) * 2, make_config().policy_for(20e6)
    confidences = torch.stack([confidence(x, temperature=t) for x, t in zip(logits, policy.temperatures)])
    images = [examples.GalleryImage(i, 'cat', ('dog',) * 4, tuple(confidences[:, i].tolist())) for i in range(60)]
    groups = dataset_view.gallery_by_exit(images, policy)
    expected = simulate(policy, logits, MACS).exit_index
    for k, group in enumerate(groups):
        assert sorted(g.tile for g in group) == (expected == k).nonzero()[0].tolist()
        assert [g.confidences[k] for g in group] == sorted((g.confidences[k] for g in group), reverse=True)


def test_the_budget_view_is_complete():
    config = make_config()
    curve = examples.load_curve('no.results', config)
    bins = dict(calibration_error=3., bins=[{'from': .9, 'to': 1., 'confidence': .95, 'accuracy': .9, 'share': 1.}])
    assets = examples.Assets(
        (), (examples.GalleryImage(0, 'cat', ('dog',) * 4, (.95, .9, .9, .9)),),
        (dict(raw=bins, calibrated={**bins, 'calibration_error': 1.}),) * 4, 'data:image/png;base64,', 16)
    for budget in (10e6, 15e6, 40e6):
        tree = Tree(dataset_view.budget_view(curve, config.policy_for(budget), config.exit_macs, assets, budget))
        assert len([c for c in tree.classes('div') if c == 'leaving']) == 4
        assert f'{curve.at(budget).accuracy:.1f}%' in tree.text
    assert 'error 3.0%' in Tree(dataset_view.reliability_diagrams(assets, False)).text
    assert 'error 1.0%' in Tree(dataset_view.reliability_diagrams(assets, True)).text


@pytest.mark.parametrize('budget', [MACS[0], 20e6, MACS[-1]])
def test_thresholds_are_shown_for_the_exits_in_use(budget):
    config = make_config()
    policy = config.policy_for(budget)
    used = policy.exits_in_use
    shown = ['off' if k not in used else 'rest' if k == used[-1] else f'≥ {policy.confidence_at(k):.3f}'
             for k in range(4)]
    html = dataset_view.budget_view(
        examples.load_curve('no.results', config), policy, config.exit_macs, examples.Assets(()), budget)
    assert re.findall(r'class="cost" title="[^"]*">([^<]*)<', html) == shown


def test_a_largest_loss_is_offered_where_it_can_be_promised(monkeypatch):
    """The page shows the policy that the guarantee chooses; a loss that cannot be promised is refused."""
    assets = examples.Assets(())

    def serve(config):
        network = types.SimpleNamespace(config=config, costs=config.costs)
        curve = examples.load_curve('no.results', config)
        monkeypatch.setattr(handlers, 'stored_for', lambda name: (network, assets, curve))
        return network

    assert not handlers.may_promise(serve(make_config()))
    network = serve(make_config(certification=2000))
    assert handlers.may_promise(network)
    policy = network.config.policy_for(max_loss=5.)
    assert policy.exit_shares[0] > 0.1
    html, status = handlers.data_page('any', BY_LOSS, None, 5.)
    assert f'Guaranteed: {policy.promise}' in html and format_macs(policy.expected_macs) in status
    for k in policy.exits_in_use[:-1]:
        assert f'≥ {policy.confidence_at(k):.3f}' in html
    with pytest.raises(gr.Error, match='0.05 points cannot be promised'):
        handlers.data_page('any', BY_LOSS, None, 0.05)
    by_budget, _ = handlers.data_page('any', BY_BUDGET, 20., 5.)
    assert 'Guaranteed' not in by_budget


def test_other_networks_are_drawn_behind():
    config = make_config()
    curve, policy = examples.load_curve('no.results', config), config.policy_for(20e6)
    other = examples.Curve(curve.images, (5e6, 80e6), (
        examples.CurvePoint(5e6, 5., (1., 0.)), examples.CurvePoint(80e6, 99., (0., 1.))))
    others = {'a <rival>': other, 'b': other}
    html = dataset_view.budget_view(curve, policy, config.exit_macs, examples.Assets(()), 20e6, others)
    tree = Tree(html)
    lines = [attrs for name, attrs in tree.tags if name == 'polyline']
    assert [line['class'].split() for line in lines] == [['line', 'other'], ['line', 'other', 'dashed'], ['line']]
    assert lines[0]['style'] != lines[1]['style'] and 'a <rival>b' in tree.text.replace('\n', '')
    points = [[float(v) for v in p.split(',')] for p in lines[0]['points'].split()]
    low, high = dataset_view.accuracy_range(curve, other)
    own = [p.accuracy for p in curve.points]
    assert 5. < low <= 2 * min(own) - max(own) and high >= 99.  # what is much lower is cut off
    left, right = 4.5, 60.  # as is what costs half as much again as the full network
    assert points[0] == pytest.approx([100 * (5. - left) / (right - left), 100 * (high - 5.) / (high - low)], abs=0.1)
    assert points[1] == pytest.approx([100 * (80. - left) / (right - left), 100 * (high - 99.) / (high - low)], abs=0.1)


@pytest.mark.parametrize('name', ['msfuse_cifar.cifar10', 'msfuse_cifar_budgeted.cifar100'])
def test_the_other_networks_of_a_data_set(name, monkeypatch):
    names = served.available_networks()
    monkeypatch.setattr(handlers, 'stored_for', lambda name: (
        types.SimpleNamespace(config=load_exit_config(name)), None, examples.load_curve(name, load_exit_config(name))))
    handlers.other_curves.cache_clear()
    tag = name.partition('.')[2]
    assert list(handlers.other_curves(name)) == [
        n.partition('.')[0] for n in names if n.endswith('.' + tag) and n != name]
    handlers.other_curves.cache_clear()
