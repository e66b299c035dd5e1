"""Policies solved on demand: budgets kept, exits chosen by cost and worth, and what is refused."""
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from timm_multiexit.errors import InputError
from timm_multiexit.stopping.config import ExitConfig
from timm_multiexit.stopping.costs import ExitCosts, StageCosts
from timm_multiexit.stopping.policy import ALWAYS, NEVER
from timm_multiexit.stopping.scores import ExitScores
from timm_multiexit.stopping.simulate import simulate
from timm_multiexit.stopping.solve import Solver, budget_grid
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


def costs_of(macs):
    return ExitCosts(tuple(macs), tuple(range(1, len(macs) + 1)), (3, 32, 32))


@pytest.fixture(scope='module')
def config(validation):
    return ExitConfig.fit(*validation, costs_of(MACS))


def test_budgets_hold_on_other_images_and_never_above_on_these(config, test_images):
    for budget in BUDGETS:
        policy = config.policy_for(budget)
        assert 0.99 * budget < policy.expected_macs <= budget
        assert simulate(policy, test_images[0], MACS).average_macs == pytest.approx(budget, rel=0.03)


def test_what_a_policy_expects_is_what_a_simulation_gives(config, validation):
    policy = config.policy_for(30e6)
    result = simulate(policy, validation[0], MACS)
    assert policy.expected_macs == round(result.average_macs)
    assert policy.expected_accuracy == pytest.approx(result.accuracy(validation[1]), abs=1e-3)
    assert policy.exit_shares == pytest.approx(result.exit_shares(4), abs=1e-5)


def test_thresholds_are_those_of_one_expected_gain(config):
    """At each exit, doubt times the share of the errors that later exits mend; image by image."""
    solver = Solver(config.scores, StageCosts.of_macs(MACS), MACS, config.temperatures)
    row = solver.thresholds((0, 1, 2), 30e6)
    worth = config.scores.values().mean(1)
    mended = [(max(worth[k + 1:]) - worth[k]) / (1. - worth[k]) for k in range(3)]
    np.testing.assert_allclose(np.exp(-row[:3]) * mended, np.exp(-row[0]) * mended[0], rtol=1e-9)


def test_early_exits_give_more_than_one_exit_for_all(config, test_images):
    accuracies = 100. * (test_images[0].argmax(2) == test_images[1]).mean(1)
    for budget in BUDGETS:
        result = simulate(config.policy_for(budget), *test_images[:1], MACS)
        assert result.accuracy(test_images[1]) > np.interp(result.average_macs, MACS, accuracies) + 0.05


def test_a_weak_exit_is_not_trusted(validation, test_images):
    """An exit whose logits are noise costs no accuracy against a network without it."""
    def spoiled(logits):
        noise = np.random.default_rng(0).normal(size=logits[1].shape).astype(np.float32)
        return np.stack([logits[0], noise, *logits[2:]])
    weak = ExitConfig.fit(spoiled(validation[0]), validation[1], costs_of(MACS))
    without = ExitConfig.fit(validation[0][[0, 2, 3]], validation[1], costs_of(MACS[:1] + MACS[2:]))
    for budget in (20e6, 30e6, 45e6):
        a = simulate(weak.policy_for(budget), spoiled(test_images[0]), MACS)
        b = simulate(without.policy_for(budget), test_images[0][[0, 2, 3]], MACS[:1] + MACS[2:])
        assert a.accuracy(test_images[1]) > b.accuracy(test_images[1]) - 0.1
        assert a.exit_shares(4)[1] < 0.01


def test_heads_that_take_time_are_evaluated_where_they_pay(config):
    free = StageCosts((1., 1., 1., 1.), (0.,) * 4)
    dear = StageCosts((1., 1., 1., 1.), (0.1, 0.9, 0.9, 0.))
    policies = [config.policy_for(average_ms=2.5, profile=p) for p in (free, dear)]
    assert len(policies[1].exits_in_use) < 4 and policies[0].expected_ms == pytest.approx(2.5, rel=0.01)
    shares, used = policies[1].exit_shares, policies[1].exits_in_use
    taken = [sum(dear.stages[:k + 1]) + sum(dear.heads[j] for j in used if j <= k) for k in used]
    assert sum(shares[k] * t for k, t in zip(used, taken)) == pytest.approx(policies[1].expected_ms, rel=1e-3)
    assert 2.45 < policies[1].expected_ms <= 2.5


def test_a_policy_in_time_is_tried_until_it_takes_what_was_asked(config):
    """On a machine where the first exit takes half the time if all images leave there, as from a warm cache."""
    def measure(policy):
        shares, used = np.array(policy.exit_shares), list(policy.exits_in_use)
        return float(shares[used] @ costs.of_exits(used)) * (1. - 0.5 * shares[0] ** 2)

    costs = StageCosts((2., 1., 1., 1.), (0.2, 0.2, 0.2, 0.), measure=measure)
    for target in (1.3, 1.6, 2., 2.5, 3., 4., 4.9):
        policy = config.policy_for(average_ms=target, profile=costs)
        assert measure(policy) == policy.expected_ms == pytest.approx(target, rel=0.1)
    with pytest.raises(InputError, match='an average of 0.900 ms cannot be kept: the cheapest policy takes 1.100 ms'):
        config.policy_for(average_ms=0.9, profile=costs)
    with pytest.raises(InputError, match='9.000 ms cannot be kept'):
        config.policy_for(average_ms='9ms', profile=costs)


def test_the_ends_hold_for_every_image(config):
    cheapest, full = config.policy_for(MACS[0]), config.policy_for(MACS[-1])
    assert cheapest.exits_in_use == (0,) and cheapest.thresholds[0] == ALWAYS
    assert full.exits_in_use == (3,)
    assert config.policy_for(0.9995 * MACS[0]).exits_in_use == (0,)  # what rounding in print may have cut off


@pytest.mark.parametrize('measure', ['entropy', 'margin'])
def test_other_confidence_measures_keep_budgets(validation, measure):
    policy = ExitConfig.fit(*validation, costs_of(MACS), measure=measure).policy_for(30e6)
    assert policy.measure == measure and policy.expected_macs == pytest.approx(30e6, rel=0.003)


KINDS = ('usual', 'all right', 'all wrong', 'equal', 'saturated')


@pytest.mark.parametrize('exits, images, kind', [
    *((exits, images, kind) for exits in (1, 2, 5) for images in (1, 2, 40, 2000) for kind in KINDS),
    (24, 1, 'usual'), (24, 400, 'usual'), (24, 400, 'saturated')])
def test_the_average_cost_never_exceeds_the_budget(exits, images, kind):
    """Whatever the scores are; close to the budget wherever the images can be split."""
    rng = np.random.default_rng(exits * images)
    targets = rng.integers(5, size=images)
    logits = rng.normal(size=(exits, images, 5)) * np.linspace(1.5, 0.7, exits)[:, None, None]
    right = 2. if kind == 'usual' else -50. if kind == 'all wrong' else 50.
    logits[:, np.arange(images), targets] += right
    if kind == 'equal':
        logits[:] = np.eye(5)[targets]
    if kind == 'saturated':
        logits *= 40.
    macs = np.arange(1, exits + 1) * 10_000_000
    config = ExitConfig.fit(logits, targets, costs_of(macs.tolist()))
    for budget in budget_grid(macs[0], macs[-1], 7 if exits < 24 else 4):
        policy = config.policy_for(budget)
        assert policy.expected_macs <= budget + 1
        if kind != 'equal' and images >= 2000:
            assert policy.expected_macs > 0.97 * budget


@pytest.mark.parametrize('exits, seconds', [(7, 0.3), (24, 3.)])
def test_a_policy_is_solved_while_one_waits(exits, seconds):
    import time
    rng = np.random.default_rng(0)
    targets = rng.integers(10, size=2000)
    logits = rng.normal(size=(exits, 2000, 10)) * np.linspace(1.5, 0.7, exits)[:, None, None]
    logits[:, np.arange(2000), targets] += 2.
    macs = [(k + 1) * 10**7 for k in range(exits)]
    config = ExitConfig.fit(logits, targets, costs_of(macs))
    taken = []
    for share in (0.3, 0.5, 0.7):
        start = time.process_time()
        policy = config.policy_for(share * macs[-1])
        taken.append(time.process_time() - start)
        assert config.policy_for(share * macs[-1]) is policy
    assert min(taken) < seconds


def test_the_path_runs_from_dear_to_cheap(config):
    path = config.path()
    macs = [p.expected_macs for p in path]
    assert len(path) > 20 and macs == sorted(macs, reverse=True) and path[-1].exits_in_use == (0,)
    assert config.path() is path


def test_arrays_and_tensors_give_the_same_config(validation):
    tensors = [torch.from_numpy(x).requires_grad_() for x in validation[0]], torch.from_numpy(validation[1])
    assert ExitConfig.fit(*tensors, costs_of(MACS)) == ExitConfig.fit(*validation, costs_of(MACS))


def test_unlabelled_images_are_solved_by_their_confidence(validation):
    unknown = validation[1].copy()
    unknown[1000:] = -1
    policy = ExitConfig.fit(validation[0], unknown, costs_of(MACS)).policy_for(30e6)
    assert policy.expected_macs == pytest.approx(30e6, rel=0.01) and policy.expected_accuracy > 50.
    none = ExitConfig.fit(validation[0], np.full(3000, -1), costs_of(MACS))
    assert none.temperatures == (1.,) * 4 and none.policy_for(30e6).expected_accuracy is None


def test_scores_take_few_bytes_and_come_back(config, tmp_path):
    config.scores.save(tmp_path / 'scores.safetensors', 'abc')
    scores, made_of = ExitScores.load(tmp_path / 'scores.safetensors')
    assert made_of['weights'] == 'abc'
    assert set(load_file(tmp_path / 'scores.safetensors')) == {'predictions', 'scores', 'labels', 'certification'}
    for name in ('predictions', 'scores', 'labels', 'certification'):
        np.testing.assert_array_equal(getattr(scores, name), getattr(config.scores, name))
    assert (tmp_path / 'scores.safetensors').stat().st_size < 150_000 * 3000 / 2000


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


def test_the_grid_goes_from_the_cheapest_exit_to_the_full_cost():
    grid = budget_grid(MACS[0], MACS[-1])
    assert grid[0] == MACS[0] and grid[-1] == MACS[-1] and len(grid) >= 25
    assert all(a < b for a, b in zip(grid, grid[1:]))


@pytest.mark.parametrize('asked, words', [
    (dict(average_budget=14e6), 'average budget of 14.00 M MACs cannot be kept: choose one from 15.00 M MACs'),
    (dict(average_budget=65e6), 'average budget of 65.00 M'),
    (dict(average_budget=float('nan')), 'average budget of nan'),
    (dict(), 'give one of average_budget, average_ms and max_loss'),
    (dict(average_budget=3e7, max_loss=1.), 'give one of'),
    (dict(average_ms=2.), 'pass its profile'),
    (dict(average_ms=0.5, profile=StageCosts((1.,) * 4, (0.1,) * 4)), 'from 1.100 ms .* to 4.100 ms'),
    (dict(average_ms=9., profile=StageCosts((1.,) * 4, (0.1,) * 4)), 'average budget of 9.000 ms'),
    (dict(average_ms=2., profile=StageCosts((1.,) * 3, (0.1,) * 3)), 'a profile of 3 exits'),
    (dict(max_loss=0.5), 'carry no certification images'),
])
def test_what_cannot_be_had_is_refused(config, asked, words):
    with pytest.raises(InputError, match=words):
        config.policy_for(**asked)


@pytest.mark.parametrize('stages, heads', [((), ()), ((1., -1.), (0., 0.)), ((1.,), (0., 0.)), ((0., 1.), (0., 0.))])
def test_costs_that_are_none_are_refused(stages, heads):
    with pytest.raises(InputError, match='a number of 0 or more for each stage'):
        StageCosts(stages, heads)


def bad(validation, **changes):
    logits, targets = validation
    return {**dict(logits=logits[:, :50], targets=targets[:50], costs=costs_of(MACS)), **changes}


@pytest.mark.parametrize('change, words', [
    (lambda v: dict(costs=costs_of(MACS[:3])), '3 costs for the logits of 4 exits'),
    (lambda v: dict(logits=v[0][:, :0], targets=v[1][:0]), 'no images'),
    (lambda v: dict(logits=v[0][:, :50, :1], targets=v[1][:50] * 0), 'single class'),
    (lambda v: dict(logits=[]), 'per exit'),
    (lambda v: dict(logits=[v[0][0, :50], v[0][1, :40]]), 'all alike'),
    (lambda v: dict(logits=np.where(np.isin(np.arange(50), [3, 4])[:, None], np.nan, v[0][:, :50])), '2 of 50 images'),
    (lambda v: dict(targets=v[1][:49]), 'one label per image'),
    (lambda v: dict(targets=v[1][:50] + 1), 'give whole numbers from 0 to 5'),
    (lambda v: dict(targets=v[1][:50] - 2), 'labels from -2'),
    (lambda v: dict(targets=v[1][:50].astype(float)), 'whole numbers'),
    (lambda v: dict(certification=np.ones(50, bool)), 'all images are kept for certification'),
    (lambda v: dict(measure='luck'), "measure 'luck'"),
])
def test_bad_input_is_refused(validation, change, words):
    with pytest.raises(InputError, match=words):
        ExitConfig.fit(**bad(validation, **change(validation)))


def test_never_is_above_every_score(config):
    assert config.scores.scores.max() < NEVER
