"""Policies that ask fewer exits: only where that costs nothing, and the family still keeps every budget."""
import pytest
import torch
from test_solver import BUDGETS, MACS, exits_of_rising_skill

from timm_multiexit.costs import ExitCosts
from timm_multiexit.policy import NEVER, simulate
from timm_multiexit.scores import Scores
from timm_multiexit.search import mixture_values, solve_search
from timm_multiexit.solver import solve_exit_config, solve_policies
from timm_multiexit.sparse import CHANGES, COST_TOLERANCE, MAX_EARLY_EXITS, TOLERANCE, fewest_exits


def saturated(images, seed):
    """Of the four exits the third and the fourth say the same."""
    logits, targets = exits_of_rising_skill(images, seed)
    return torch.stack([logits[0], logits[1], logits[3], logits[3]]), targets


@pytest.fixture(scope='module')
def validation():
    return saturated(3000, seed=1)


def asked(thresholds):
    return tuple(k for k, t in enumerate(thresholds[:3]) if t < NEVER)


def test_sets_of_exits_are_worth_as_much_and_keep_their_budgets(validation):
    logits, targets = validation
    scores = Scores.from_logits(logits, targets, MACS, (1.,) * 4, 'max_softmax')
    values, shares = mixture_values(logits, targets), [b / MACS[-1] for b in BUDGETS]
    dense = solve_search(scores, values, shares, mixture=2)
    path = fewest_exits(scores, values, dense, shares)
    valued = Scores(scores.confidences, values, scores.costs)
    assert (valued.average_values(path.thresholds) >= valued.average_values(dense) - TOLERANCE).all()
    answers = [scores.values.gather(0, scores.exits(t)) for t in (path.thresholds, dense)]
    assert ((answers[0] != answers[1]).double().mean(1) <= CHANGES).all()
    changed = [i for i, exits in enumerate(path.exits) if exits is not None]
    # From one budget on, all those above it.
    assert changed and changed == list(range(changed[0], len(BUDGETS)))
    for i in changed:
        assert asked(path.thresholds[i].tolist()) == path.exits[i] and len(path.exits[i]) <= MAX_EARLY_EXITS
        assert float(valued.average_costs(path.thresholds[i:i + 1])) == pytest.approx(shares[i], rel=COST_TOLERANCE)
    for i in range(changed[0]):
        assert torch.equal(path.thresholds[i], dense[i]) and path.before[i] is None
    # Where the set changes, the one below is solved for this budget too.
    for i in range(1, len(BUDGETS)):
        assert (path.before[i] is None) == (path.exits[i] == path.exits[i - 1])
    assert torch.equal(path.before[changed[0]], dense[changed[0]])


def test_all_exits_stay_where_each_of_them_counts():
    logits, targets = exits_of_rising_skill(3000, seed=1)
    policy, = solve_policies(logits, targets, MACS, [24e6])
    assert asked(policy.thresholds) == (0, 1, 2)


def test_the_order_of_budgets_does_not_matter(validation):
    budgets = [50e6, 20e6, 33e6]
    there = solve_policies(*validation, MACS, budgets)
    back = solve_policies(*validation, MACS, budgets[::-1])
    assert [p.thresholds for p in there] == [p.thresholds for p in back[::-1]]


def test_a_family_with_changing_exits_keeps_the_budgets_between_its_own(validation):
    config = solve_exit_config(*validation, ExitCosts(MACS, (1, 2, 3, 4), (3, 32, 32)))
    budgets = [p.budget for p in config.policies]
    assert budgets == sorted(set(budgets)) and budgets[0] == MACS[0] and budgets[-1] == MACS[-1]
    sets = [asked(p.thresholds) for p in config.policies]
    assert len(set(sets)) > 2
    for low, high, a, b in zip(budgets, budgets[1:], sets, sets[1:]):
        assert a == b or high - low == 1 or high == MACS[-1] or low == MACS[0] or len(a) == 3
        if high - low > 1:
            middle = config.policy_for((low + high) / 2)
            assert simulate(middle, validation[0], MACS).average_macs == pytest.approx((low + high) / 2, rel=0.01)
