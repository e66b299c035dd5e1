"""Policies that use fewer exits: only where that costs nothing, and every budget is still kept."""
import numpy as np
import pytest
import torch
from test_solve import BUDGETS, MACS, exits_of_rising_skill

from timm_multiexit.stopping.costs import ExitCosts
from timm_multiexit.stopping.fewest_exits import COST_TOLERANCE, LITTLE, MAX_EARLY_EXITS, NOTHING, fewest_exits
from timm_multiexit.stopping.policy import NEVER
from timm_multiexit.stopping.scores import Scores
from timm_multiexit.stopping.search import mixture_values, solve_search
from timm_multiexit.stopping.simulate import simulate
from timm_multiexit.stopping.solve import solve_exit_config, solve_policies


def saturated(images, seed):
    """Four exits, of which the third and the fourth give the same answers."""
    logits, targets = exits_of_rising_skill(images, seed)
    return logits[[0, 1, 3, 3]], targets


def nearly_saturated(images, seed):
    """Four exits with the logits of the last one and some noise, like those of a well-trained network."""
    logits, targets = exits_of_rising_skill(images, seed)
    generator = torch.Generator().manual_seed(seed + 10)
    noise = np.reshape([0.7, 0.4, 0.2, 0.], (4, 1, 1)) * torch.randn(logits.shape, generator=generator).numpy()
    return logits[3] + noise, targets


@pytest.fixture(scope='module')
def validation():
    return saturated(3000, seed=1)


def used(thresholds):
    return tuple(k for k, t in enumerate(thresholds[:3]) if t < NEVER)


@pytest.mark.parametrize('tolerance', [NOTHING, LITTLE])
def test_fewer_exits_are_worth_as_much_and_keep_their_budgets(validation, tolerance):
    logits, targets = validation
    scores = Scores.from_logits(logits, targets, MACS, (1.,) * 4, 'max_softmax')
    values, shares = mixture_values(logits, targets), [b / MACS[-1] for b in BUDGETS]
    dense = solve_search(scores, values, shares)
    thresholds, before = fewest_exits(scores, values, dense, shares, tolerance)
    valued = Scores(scores.confidences, values, scores.costs)
    assert (valued.average_values(thresholds) >= valued.average_values(dense) - tolerance.value).all()
    answers = [scores.values_at(scores.exits(t)) for t in (thresholds, dense)]
    assert ((answers[0] != answers[1]).mean(1) <= tolerance.changes).all()
    changed = [i for i in range(len(BUDGETS)) if not np.array_equal(thresholds[i], dense[i])]
    # From one budget upwards.
    assert changed and changed == list(range(changed[0], len(BUDGETS)))
    for i in changed:
        assert len(used(thresholds[i])) <= MAX_EARLY_EXITS
        assert valued.average_costs(thresholds[i:i + 1])[0] == pytest.approx(shares[i], rel=COST_TOLERANCE)
    for i in range(changed[0]):
        assert before[i] is None
    # Where the exits change, those of the budget below are solved for this one too.
    for i in changed[1:]:
        assert (before[i] is None) == (used(thresholds[i]) == used(thresholds[i - 1]))
    assert np.array_equal(before[changed[0]], dense[changed[0]])


def test_all_exits_are_in_use_where_each_of_them_counts():
    logits, targets = exits_of_rising_skill(3000, seed=1)
    policy, = solve_policies(logits, targets, MACS, ['search'], [24e6])['search']
    assert used(policy.thresholds) == (0, 1, 2)


def test_fast_policies_use_fewer_exits_and_lose_little():
    validation, (logits, targets) = nearly_saturated(3000, seed=1), nearly_saturated(50_000, seed=2)
    families = solve_policies(*validation, MACS, ('search', 'fast'), BUDGETS)
    lost, counts = [], {'search': [], 'fast': []}
    for best, fast in zip(families['search'], families['fast']):
        lost.append(simulate(best, logits, MACS).accuracy(targets) - simulate(fast, logits, MACS).accuracy(targets))
        for policy in (best, fast):
            counts[policy.method].append(len(used(policy.thresholds)))
    assert all(a <= b for a, b in zip(counts['fast'], counts['search']))
    assert sum(counts['fast']) < sum(counts['search'])
    assert max(lost) < 0.5 and min(counts['fast']) == 1
    # Solving one method alone gives the same.
    assert families['fast'] == solve_policies(*validation, MACS, ['fast'], BUDGETS)['fast']


def test_the_order_of_budgets_does_not_matter(validation):
    budgets = [50e6, 20e6, 33e6]
    there = solve_policies(*validation, MACS, ['search'], budgets)['search']
    back = solve_policies(*validation, MACS, ['search'], budgets[::-1])['search']
    assert [p.thresholds for p in there] == [p.thresholds for p in back[::-1]]


def test_interpolated_policies_keep_budgets_where_the_exits_in_use_change(validation):
    config = solve_exit_config(*validation, ExitCosts(MACS, (1, 2, 3, 4), (3, 32, 32)))
    budgets = [p.budget for p in config.policies]
    assert budgets == sorted(set(budgets)) and budgets[0] == MACS[0] and budgets[-1] == MACS[-1]
    sets = [used(p.thresholds) for p in config.policies]
    assert len(set(sets)) > 2
    for low, high, a, b in zip(budgets, budgets[1:], sets, sets[1:]):
        assert a == b or high - low == 1 or high == MACS[-1] or low == MACS[0] or len(a) == 3
        if high - low > 1:
            middle = config.policy_for((low + high) / 2)
            assert simulate(middle, validation[0], MACS).average_macs == pytest.approx((low + high) / 2, rel=0.01)
