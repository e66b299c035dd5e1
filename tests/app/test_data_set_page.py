"""The app's page on a whole data set: curve, gallery and thresholds under a budget."""
import re

import pytest
import torch
from app_pages import MACS, Tree, make_config

from timm_multiexit.stopping.policy import confidence
from timm_multiexit.stopping.simulate import simulate

pytest.importorskip('gradio', reason="the app needs gradio: pip install 'timm-multiexit[app]'")

import dataset_view  # noqa: E402
import examples  # noqa: E402


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
        tree = Tree(dataset_view.budget_view(curve, config, assets, budget))
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
    html = dataset_view.budget_view(examples.load_curve('no.results', config), config, examples.Assets(()), budget)
    assert re.findall(r'class="cost" title="[^"]*">([^<]*)<', html) == shown
