"""Where images leave since start, against the held-out ones: alarms, false alarms, and a cap on the average cost."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import calibrated_network
from scipy.stats import chi2
from test_solve import MACS, costs_of, exits_of_rising_skill

from timm_multiexit import EarlyExitRunner, InputError
from timm_multiexit.stopping.config import ExitConfig
from timm_multiexit.stopping.costs import ExitCosts
from timm_multiexit.stopping.monitor import ALPHA, ExitMonitor, chi_square_tail
from timm_multiexit.stopping.policy import ExitPolicy
from timm_multiexit.stopping.scores import ExitScores


@pytest.fixture(scope='module')
def config():
    return ExitConfig.fit(*exits_of_rising_skill(2000, seed=1), costs_of(MACS))


@pytest.fixture(scope='module')
def images(config):
    """Scores of 20,000 other images of the same kind."""
    return ExitScores.from_logits(*exits_of_rising_skill(20_000, seed=2), config.temperatures)


@pytest.fixture(scope='module')
def network():
    return calibrated_network()


@pytest.fixture(scope='module')
def photos_of_noise():
    return torch.randn(64, 3, 32, 32)


def watch(monitor, images, batch=50):
    """Runs images batch by batch, each under the policy of the moment."""
    for start in range(0, images.num_images, batch):
        part = images.subset(np.arange(start, min(start + batch, images.num_images)))
        monitor.update(part.exits(monitor.policy.thresholds))


def hardest(images, policy):
    """Those that leave late, first those that leave last."""
    return images.subset(np.argsort(-images.exits(policy.thresholds), kind='stable')[:4000])


def test_the_tail_of_chi_square_is_scipys():
    for degrees in (1, 2, 3, 6, 7, 23, 24):
        for statistic in (0.1, 1., 5., 30., 200.):
            assert chi_square_tail(statistic, degrees) == pytest.approx(chi2.sf(statistic, degrees), rel=1e-9)


def test_images_of_the_same_kind_raise_no_alarm_and_others_do(config, images):
    policy = config.policy_for('30M')
    same, harder = ExitMonitor(config, policy), ExitMonitor(config, policy)
    watch(same, images)
    assert same.warning is None and same.images == 20_000
    assert same.average_macs == pytest.approx(30e6, rel=0.03)
    assert same.expected_macs == pytest.approx(policy.expected_macs)
    watch(harder, hardest(images, policy))
    assert harder.average_macs > 40e6
    assert 'calibrate on new ones' in harder.warning and '4,000 images left at exits 1 to 4' in str(harder)


@pytest.mark.parametrize('budget', ['20M', '45M'])
@pytest.mark.parametrize('held_out, seen', [(60, 5000), (2000, 100), (2000, 2000)])
def test_the_chance_of_a_false_alarm_is_what_it_says(config, images, budget, held_out, seen):
    """Held-out and new images from the same source, 1,000 times; also few of either, and exits that few leave at."""
    rng = np.random.default_rng(0)
    policy = config.policy_for(budget)
    exits = images.exits(policy.thresholds)
    found = []
    for _ in range(1000):
        known = images.subset(rng.choice(len(exits), held_out))
        monitor = ExitMonitor(replace(config, scores=known), policy)
        monitor.update(rng.choice(exits, seen))
        found.append(monitor.p_value())
    found = np.array(found)
    assert 0.03 < (found < 0.05).mean() < 0.07
    assert (found < ALPHA).sum() <= 2


def test_the_average_is_kept_below_the_limit_and_thresholds_come_back(config, images):
    policy = config.policy_for('30M')
    free, capped = ExitMonitor(config, policy), ExitMonitor(config, policy, '32M')
    for monitor in (free, capped):
        watch(monitor, hardest(images, policy))
    assert free.average_macs > 40e6 and free.policy is policy
    assert capped.average_macs < 1.02 * 32e6 and capped.policy is not policy
    watch(capped, images.subset(np.flatnonzero(images.exits(policy.thresholds) == 0)))
    assert capped.policy is policy


def test_what_cannot_be_watched_is_refused(config):
    with pytest.raises(InputError, match='10.00 M MACs on average cannot be kept: the first exit costs 15.00 M'):
        ExitMonitor(config, config.policy_for('30M'), '10M')
    with pytest.raises(InputError, match='thresholds on entropy cannot be compared'):
        ExitMonitor(config, replace(config.policy_for('30M'), measure='entropy'))
    bare = ExitConfig(**{**config.to_dict(), 'scores': None})
    with pytest.raises(InputError, match='no scores are stored'):
        ExitMonitor(bare, config.policy_for('30M'))


@pytest.mark.parametrize('batch_size', [1, 8])
def test_the_runner_tells_the_monitor_and_follows_it(network, photos_of_noise, batch_size):
    model, config = network
    whole = ExitPolicy.at_exit(config.num_exits - 1, config.num_exits)
    limit = (config.exit_macs[0] + config.exit_macs[-1]) / 2
    monitor = ExitMonitor(config, whole, limit)
    costs = ExitCosts(config.exit_macs, config.exit_params, config.input_size)
    run = EarlyExitRunner(model, whole, costs=costs, monitor=monitor).run_loader(photos_of_noise.split(batch_size))
    assert monitor.counts.tolist() == np.bincount(run.exit_index, minlength=config.num_exits).tolist()
    assert run.exit_index[0] == config.num_exits - 1 and run.exit_index.min() < config.num_exits - 1
    assert monitor.average_macs == run.average_macs
