"""Solvers: the geometric rule to the letter, the search against it, budgets kept on new images, bad input."""
import dataclasses

import numpy as np
import pytest
import torch

from timm_multiexit.errors import InputError
from timm_multiexit.stopping.costs import ExitCosts
from timm_multiexit.stopping.geometric import geometric_thresholds
from timm_multiexit.stopping.policy import NEVER, confidence
from timm_multiexit.stopping.scores import Quantiles, Scores, interpolate
from timm_multiexit.stopping.search import choose_mixtures, descend, mixture_values, prices
from timm_multiexit.stopping.simulate import simulate
from timm_multiexit.stopping.solve import METHODS, budget_grid, solve_exit_config, solve_policies
from timm_multiexit.stopping.temperature import fit_temperature

MACS = (15_000_000, 27_000_000, 43_000_000, 64_000_000)
BUDGETS = [17e6, 20e6, 24e6, 28e6, 33e6, 40e6, 50e6, 60e6]


def exits_of_rising_skill(images, seed, classes=6):
    """Logits of four exits, whose noise shrinks with depth, and labels.

    Part of the noise belongs to the image and is the same at all exits, as in a network whose exits share stages.
    """
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (images,), generator=generator)
    common = torch.randn(images, classes, generator=generator)
    common[torch.arange(images), targets] += 4. + 2. * torch.randn(images, generator=generator)
    logits = []
    for noise in (1.6, 1.1, 0.8, 0.6):
        logits.append(common + noise * torch.randn(images, classes, generator=generator))
    return torch.stack(logits).numpy(), targets.numpy()


@pytest.fixture(scope='module')
def validation():
    return exits_of_rising_skill(3000, seed=1)


@pytest.fixture(scope='module')
def test_images():
    return exits_of_rising_skill(50_000, seed=2)


@pytest.fixture(scope='module')
def families(validation):
    return solve_policies(*validation, MACS, METHODS, BUDGETS)


def rule_by_hand(confidences, q):
    """MSDNet's rule, image by image."""
    exits, images = confidences.shape
    total = sum(q ** (k + 1) for k in range(exits))
    gone, thresholds = set(), []
    for k in range(exits - 1):
        wanted = int(images * (q ** (k + 1) / total))
        ranking = sorted((n for n in range(images) if n not in gone), key=lambda n: -confidences[k, n].item())
        if wanted == 0 or not ranking:
            thresholds.append(NEVER)
            continue
        thresholds.append(confidences[k, ranking[min(wanted, len(ranking)) - 1]].item())
        gone |= {n for n in ranking if confidences[k, n].item() >= thresholds[-1]}
    return thresholds


@pytest.mark.parametrize('q', [0.01, 0.4, 0.9, 1.3, 2.5, 40.])
def test_geometric_rule_to_the_letter(q):
    logits, targets = exits_of_rising_skill(400, seed=3)
    scores = Scores.from_logits(logits, targets, MACS, (1.,) * 4, 'max_softmax')
    assert geometric_thresholds(scores, [q])[0].tolist() == rule_by_hand(scores.confidences, q)


def test_geometric_shares_change_by_the_factor_q(validation):
    logits, targets = validation
    scores = Scores.from_logits(logits, targets, MACS, (1.,) * 4, 'max_softmax')
    counts = np.bincount(scores.exits(geometric_thresholds(scores, [0.7]))[0], minlength=4)
    np.testing.assert_allclose(counts[1:] / counts[:-1], 0.7, atol=0.01, rtol=0)


@pytest.mark.parametrize('method', METHODS)
def test_budgets_are_kept_on_validation_and_on_new_images(families, test_images, validation, method):
    for budget, policy in zip(BUDGETS, families[method]):
        assert policy.budget == budget and policy.method == method
        assert policy.expected_macs == pytest.approx(budget, rel=0.003)
        again = simulate(policy, validation[0], MACS)
        assert policy.expected_macs == pytest.approx(again.average_macs, abs=1.)
        assert policy.expected_accuracy == pytest.approx(again.accuracy(validation[1]), abs=1e-3)
        assert policy.exit_shares == pytest.approx(again.exit_shares(4), abs=1e-4)
        assert simulate(policy, test_images[0], MACS).average_macs == pytest.approx(budget, rel=0.03)


def test_search_beats_the_rule_on_new_images(families, test_images):
    logits, targets = test_images
    curves = {}
    for method, policies in families.items():
        results = [simulate(p, logits, MACS) for p in policies]
        curves[method] = np.array([[r.average_macs for r in results], [r.accuracy(targets) for r in results]])
    macs, accuracy = curves['search']
    gain = accuracy - interpolate(*curves['geometric'], macs)
    assert gain.mean() > 0.03 and gain.min() > -0.1


@pytest.mark.parametrize('method', METHODS)
def test_the_ends_hold_for_any_image(validation, method):
    logits, targets = validation
    cheapest, full = solve_policies(
        logits[:, :300], targets[:300], MACS, [method], [MACS[0], MACS[-1]])[method]
    assert cheapest.exit_shares == (1., 0., 0., 0.) and cheapest.expected_macs == MACS[0]
    assert full.exit_shares == (0., 0., 0., 1.) and full.expected_macs == MACS[-1]
    extreme = np.tile(np.stack([np.zeros(6), 1000. * np.eye(6)[0]]), (4, 1, 1))  # lowest and highest confidence
    assert simulate(cheapest, extreme, MACS).exit_index.tolist() == [0, 0]
    assert simulate(full, extreme, MACS).exit_index.tolist() == [3, 3]


def test_descent_ends_where_no_single_threshold_improves_the_objective(validation):
    logits, targets = validation
    scores = Scores.from_logits(logits[:, :600], targets[:600], MACS, (1.,) * 4, 'max_softmax')
    price = prices()
    start = np.full((len(price), 3), 0.7, np.float32)
    found = descend(scores, np.ones(600, np.float32), start, sweeps=30)

    def objective(thresholds):
        return scores.average_values(thresholds) - price * scores.average_costs(thresholds)

    best = objective(found)
    assert (best > objective(start) - 1e-6).all() and (best > objective(start) + 1e-3).any()
    for k in range(3):
        for step in (-0.1, -0.02, 0.02, 0.1):
            moved = found.copy()
            moved[:, k] += step
            # not exactly 0, since images that have left keep a small weight
            assert (objective(moved) - best).max() < 5e-3


def test_cross_validation_keeps_to_the_rule_where_deeper_exits_are_worth_nothing():
    """All exits give the same answers: no thresholds are better than others, and none may look so."""
    logits, targets = exits_of_rising_skill(500, seed=5)
    same = np.tile(logits[:1], (4, 1, 1))
    scores = Scores.from_logits(same, targets, MACS, (1.,) * 4, 'max_softmax')
    scores = dataclasses.replace(scores, values=mixture_values(same, targets))
    chosen, gains, _ = choose_mixtures(scores)
    assert not chosen.any() and np.abs(gains).max() < 1e-6


def test_solving_twice_gives_the_same_from_arrays_and_from_tensors(validation):
    logits, targets = validation
    first, second = (solve_policies(logits[:, :300], targets[:300], MACS, ['search'], [30e6]) for _ in range(2))
    assert first == second
    tensors = [torch.from_numpy(x).requires_grad_() for x in logits[:, :300]], torch.from_numpy(targets[:300])
    assert first == solve_policies(*tensors, MACS, ['search'], [30e6])


@pytest.mark.parametrize('measure', ['entropy', 'margin'])
def test_other_confidence_measures_keep_budgets(validation, measure):
    (policy,) = solve_policies(*validation, MACS, ['geometric'], [30e6], measure)['geometric']
    assert policy.measure == measure and policy.expected_macs == pytest.approx(30e6, rel=0.003)


def test_a_single_exit_takes_all_images():
    logits, targets = exits_of_rising_skill(100, seed=0)
    (policy,) = solve_policies(logits[:1], targets, MACS[:1], ['search'], [MACS[0]])['search']
    assert policy.thresholds == (0.,) and policy.exit_shares == (1.,)


@pytest.mark.parametrize('scale', [0.5, 2., 4.])
def test_temperature_undoes_a_scale(scale):
    """Labels are drawn from the softmax itself: logits scaled by s have the temperature s."""
    generator = torch.Generator().manual_seed(0)
    logits = 2. * torch.randn(20_000, 5, generator=generator)
    targets = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    assert fit_temperature(scale * logits, targets) == pytest.approx(scale, rel=0.04)


def test_temperature_of_errorless_logits_is_bounded():
    assert 0.05 <= fit_temperature(5. * torch.eye(4), torch.arange(4)) < 1.
    assert 1. < fit_temperature(5. * torch.eye(4), torch.arange(4).flip(0)) <= 20.


def test_quantiles_turn_thresholds_into_ranks_and_back(validation):
    confidences = np.stack([confidence(x) for x in validation[0]])
    quantiles = Quantiles(confidences)
    ranks = np.array([[0., 0.25, 1.], [0.1, 0.5, 0.999]])
    thresholds = quantiles.thresholds(ranks)
    assert thresholds[0, 0] == 0. and thresholds[0, 2] == NEVER
    below = (confidences[:3, None] < thresholds.T[:, :, None]).mean(2).T
    np.testing.assert_allclose(below, ranks, atol=1e-3, rtol=0)
    np.testing.assert_allclose(quantiles.ranks(thresholds), ranks, atol=1e-3, rtol=0)


def test_the_grid_goes_from_the_cheapest_exit_to_the_full_cost():
    grid = budget_grid(MACS)
    assert grid[0] == MACS[0] and grid[-1] == MACS[-1] and len(grid) >= 25
    assert all(a < b for a, b in zip(grid, grid[1:]))


def test_stored_family_answers_budgets_between_the_grid(validation, test_images):
    config = solve_exit_config(*validation, ExitCosts(MACS, (1, 2, 3, 4), (3, 32, 32)), method='geometric')
    assert config.num_exits == 4 and config.temperatures == config.policies[0].temperatures
    for budget in (15.2e6, 18.7e6, 25e6, 41.23e6, 63.5e6):
        policy = config.policy_for(budget)
        assert policy.budget == budget
        assert simulate(policy, test_images[0], MACS).average_macs == pytest.approx(budget, rel=0.03)


def bad(validation, **changes):
    logits, targets = validation
    values = dict(logits=logits[:, :50], targets=targets[:50], exit_macs=MACS, methods=['search'], budgets=[30e6])
    return {**values, **changes}


@pytest.mark.parametrize('change, words', [
    (lambda v: dict(budgets=[14e6]), 'average budget of 14.00 M'),
    (lambda v: dict(budgets=[65e6]), 'average budget of 65.00 M'),
    (lambda v: dict(budgets=[float('nan')]), 'average budget of nan'),
    (lambda v: dict(exit_macs=MACS[:3]), '3 costs for the logits of 4 exits'),
    (lambda v: dict(logits=v[0][:, :0], targets=v[1][:0]), 'no images'),
    (lambda v: dict(logits=v[0][:, :50, :1], targets=v[1][:50] * 0), 'single class'),
    (lambda v: dict(logits=[]), 'per exit'),
    (lambda v: dict(logits=[v[0][0, :50], v[0][1, :40]]), 'all alike'),
    (lambda v: dict(logits=np.where(np.isin(np.arange(50), [3, 4])[:, None], np.nan, v[0][:, :50])), '2 of 50 images'),
    (lambda v: dict(targets=v[1][:49]), 'one label per image'),
    (lambda v: dict(targets=v[1][:50] + 1), 'give whole numbers from 0 to 5'),
    (lambda v: dict(targets=v[1][:50] - 1), 'labels from -1'),
    (lambda v: dict(targets=v[1][:50].astype(float)), 'whole numbers'),
    (lambda v: dict(methods=['guess']), "unknown method 'guess'"),
    (lambda v: dict(measure='luck'), "unknown confidence measure 'luck'"),
])
def test_bad_input_is_refused(validation, change, words):
    with pytest.raises(InputError, match=words):
        solve_policies(**bad(validation, **change(validation)))
