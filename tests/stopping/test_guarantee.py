"""Guarantees: exact tails, promises kept in simulation, and what is refused."""
import numpy as np
import pytest

from timm_multiexit.errors import InputError
from timm_multiexit.stopping.guarantee import (
    betting_passes,
    binomial_passes,
    binomial_tail,
    certified,
    risk_losses,
)


@pytest.mark.parametrize('n, p', [(1, 0.3), (37, 0.01), (2000, 0.005), (10_000, 0.02), (10_000, 0.999)])
def test_the_binomial_tail_is_scipys(n, p):
    stats = pytest.importorskip('scipy.stats')
    for k in {-1, 0, 1, int(n * p), int(n * p) // 2, n - 1, n}:
        assert binomial_tail(k, n, p) == pytest.approx(stats.binom.cdf(k, n, p), rel=1e-8, abs=1e-300)


def test_losses_of_each_risk():
    labels, full = np.array([0, 1, 2, 3]), np.array([0, 1, 0, 0])
    answers = np.array([[0, 0, 2, 1]])  # correct, harmed, gained, wrong either way and different
    assert risk_losses('accuracy', answers, full, labels).tolist() == [[0, 1, -1, 0]]
    assert risk_losses('harm', answers, full, labels).tolist() == [[0, 1, 0, 0]]
    assert risk_losses('consistency', answers, full).tolist() == [[0, 1, 1, 1]]
    with pytest.raises(InputError, match='needs labels'):
        risk_losses('harm', answers, full)
    with pytest.raises(InputError, match="unknown risk 'regret'"):
        risk_losses('regret', answers, full, labels)


def draws(rng, harm, help_, size):
    u = rng.random(size)
    return (u < harm).astype(np.int8) - (u > 1. - help_).astype(np.int8)


@pytest.mark.parametrize('test, harm, help_', [(betting_passes, 0.02, 0.01), (binomial_passes, 0.01, 0.)])
def test_at_the_border_a_wrong_promise_is_made_no_more_often_than_allowed(test, harm, help_):
    """The true mean is exactly what is allowed: at most 10 % may pass; 2,000 trials, so 12 % is 3 errors away."""
    rng = np.random.default_rng(0)
    passes = test(draws(rng, harm, help_, (2000, 1000)), 0.01, 0.1)
    assert 0.01 < passes.mean() < 0.12


def test_gains_pay_for_losses_and_the_bet_sees_it():
    rng = np.random.default_rng(0)
    losses = draws(rng, 0.008, 0.006, (200, 5000))
    assert betting_passes(losses, 0.01, 0.1).mean() > 0.95
    assert binomial_passes(np.maximum(losses, 0), 0.01, 0.1).mean() < 0.8


def test_the_last_candidate_that_passed_answers_not_the_first_that_failed():
    rng = np.random.default_rng(0)
    losses = np.stack([draws(rng, rate, 0., 5000) for rate in (0., 0.001, 0.004, 0.05, 0.)])
    assert certified(losses, 1., risk='harm') == 2  # the fifth is as safe as the first, but the fourth stands before it
    assert certified(losses, 1.) == 2
    assert certified(losses[3:], 1.) is None


@pytest.mark.parametrize('kwargs, words', [
    (dict(max_loss=0.), 'above 0'), (dict(max_loss=100.), 'below 100'), (dict(max_loss=1., certainty=1.), 'between 0'),
    (dict(max_loss=1., certainty=0.), 'between 0')])
def test_numbers_out_of_range_are_refused(kwargs, words):
    with pytest.raises(InputError, match=words):
        certified(np.zeros((2, 10), np.int8), **kwargs)
