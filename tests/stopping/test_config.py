"""The exit config: the same in the package, beside a checkpoint and in config.json; policies between its budgets."""
import dataclasses
import json

import pytest
import timm
import torch
from conftest import SMALL

from timm_multiexit.errors import InputError
from timm_multiexit.models._costs import exit_costs
from timm_multiexit.models._pretrained import WEIGHTS_DIR
from timm_multiexit.pretrained.exit_config import load_exit_config
from timm_multiexit.pretrained.load import load_model
from timm_multiexit.pretrained.names import list_networks
from timm_multiexit.stopping.config import FILE_NAME, ExitConfig
from timm_multiexit.stopping.policy import NEVER, ExitPolicy
from timm_multiexit.stopping.simulate import simulate

MACS = (10_000_000, 20_000_000, 40_000_000)
TEMPERATURES = (0.9, 1.1, 1.)


def policy(thresholds, macs, shares):
    return ExitPolicy(thresholds, TEMPERATURES, 'entropy', macs, macs, 90. + macs / 1e7, shares, 'search')


def small_config(**changes):
    policies = (
        policy((0., 0., 0.), 10e6, (1., 0., 0.)),
        policy((0.6, 0.5, 0.), 20e6, (0.5, 0.3, 0.2)),
        policy((0.8, 0.9, 0.), 30e6, (0.2, 0.2, 0.6)),
        policy((NEVER, NEVER, 0.), 40e6, (0., 0., 1.)),
    )
    values = dict(
        exit_macs=MACS, exit_params=(1, 2, 3), input_size=(3, 32, 32), temperatures=TEMPERATURES, policies=policies,
        class_names=('cat', 'dog'))
    return ExitConfig(**{**values, **changes})


def fast(policies):
    return tuple(dataclasses.replace(p, thresholds=(NEVER, *p.thresholds[1:]), method='fast') for p in policies)


def test_saved_configs_come_back_the_same(tmp_path):
    both = small_config(fast_policies=fast(small_config().policies))
    for config in (small_config(), small_config(class_names=None), small_config(policies=()), both):
        config.save(tmp_path / FILE_NAME)
        assert ExitConfig.load(tmp_path / FILE_NAME) == config
        assert ExitConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_stored_budget_gets_its_policy_and_one_between_gets_interpolated_thresholds():
    config = small_config()
    for p in config.policies:
        assert config.policy_for(p.budget) == p
    between = config.policy_for(22.5e6)
    assert between.thresholds == pytest.approx((0.65, 0.6, 0.))
    assert between.budget == between.expected_macs == 22.5e6
    assert between.expected_accuracy == pytest.approx(92.25)
    assert between.exit_shares == pytest.approx((0.425, 0.275, 0.3))
    assert (between.measure, between.temperatures, between.method) == ('entropy', TEMPERATURES, 'search')
    # near the full cost: towards 1, the largest confidence
    assert config.policy_for(35e6).thresholds == pytest.approx((0.9, 0.95, 0.))
    assert config.policy_for(40.02e6).thresholds == (NEVER, NEVER, 0.)


def test_fast_policies_are_stored_beside_the_others():
    config = small_config(fast_policies=fast(small_config().policies[1:]))
    assert config.policy_for(30e6, fast=True) == config.fast_policies[1] != config.policy_for(30e6)
    assert config.policy_for(25e6, fast=True).thresholds == pytest.approx((NEVER, 0.7, 0.))
    with pytest.raises(InputError, match='from 20.00 M to 40.00 M'):
        config.policy_for(12e6, fast=True)
    with pytest.raises(InputError, match='no fast policies are stored'):
        small_config().policy_for(30e6, fast=True)
    with pytest.raises(InputError, match='out of order'):
        small_config(fast_policies=config.fast_policies[::-1])
    with pytest.raises(InputError, match='measure'):
        small_config(fast_policies=(dataclasses.replace(config.fast_policies[0], measure='margin'),)).to_dict()
    values = small_config().to_dict()
    values.pop('fast_policies')  # a file from before they existed
    assert ExitConfig.from_dict(values) == small_config()
    with pytest.raises(InputError, match='fast_policies are not a list'):
        ExitConfig.from_dict({**small_config().to_dict(), 'fast_policies': {}})


def test_budgets_out_of_reach_are_refused():
    for budget in (9e6, 41e6, float('nan')):
        with pytest.raises(InputError, match='from 10.00 M .* to 40.00 M'):
            small_config().policy_for(budget)
    partial = small_config(policies=small_config().policies[1:3])
    assert partial.policy_for(20e6).budget == 20e6
    for budget in (15e6, 35e6):
        with pytest.raises(InputError, match='from 20.00 M to 30.00 M'):
            partial.policy_for(budget)
    with pytest.raises(InputError, match='no policies are stored'):
        small_config(policies=()).policy_for(20e6)


@pytest.mark.parametrize('changes, words', [
    (dict(exit_macs=(10, 20)), '3 parameter counts'),
    (dict(exit_macs=(10, 20, 20)), 'rise from exit to exit'),
    (dict(exit_macs=(0, 20, 30)), 'rise from exit to exit'),
    (dict(temperatures=(1., 1.)), '2 temperatures'),
    (dict(exit_macs='all'), 'give a list'),
    (dict(version=2), 'version 2'),
    (dict(policies=small_config().policies[::-1]), 'out of order'),
    (dict(policies=(ExitPolicy((0.5, 0.), (1., 1.), budget=1e7),)), '2 exits does not fit a network with 3'),
    (dict(policies=(ExitPolicy((0.5, 0.5, 0.), TEMPERATURES),)), 'give each its budget'),
])
def test_values_that_do_not_fit_together_are_refused(changes, words):
    with pytest.raises(InputError, match=words):
        small_config(**changes)


def test_policies_of_more_than_one_kind_are_not_stored():
    other = ExitPolicy((0.5, 0.5, 0.), TEMPERATURES, 'margin', 15e6, method='search')
    mixed = small_config(policies=(small_config().policies[0], other))
    with pytest.raises(InputError, match='measure'):
        mixed.to_dict()
    warmer = ExitPolicy((0.5, 0.5, 0.), (1., 1., 1.), 'entropy', 15e6, method='search')
    with pytest.raises(InputError, match='temperatures'):
        small_config(policies=(small_config().policies[0], warmer)).to_dict()


@pytest.mark.parametrize('spoil', [
    lambda v: v.pop('exit_macs'),
    lambda v: v.pop('version'),
    lambda v: v.update(version=99),
    lambda v: v.update(surprise=1),
    lambda v: v.update(policies='none'),
    lambda v: v.update(policies=[1]),
    lambda v: v['policies'][1].pop('thresholds'),
    lambda v: v['policies'][1].update(thresholds=[0.5]),
    lambda v: v.update(temperatures=None),
])
def test_spoiled_files_are_refused(tmp_path, spoil):
    values = small_config().to_dict()
    spoil(values)
    (tmp_path / FILE_NAME).write_text(json.dumps(values))
    with pytest.raises(InputError):
        ExitConfig.load(tmp_path / FILE_NAME)


def test_truncated_and_missing_files_are_refused(tmp_path):
    path = tmp_path / FILE_NAME
    small_config().save(path)
    path.write_text(path.read_text()[:100])
    with pytest.raises(InputError, match='cannot be read'):
        ExitConfig.load(path)
    with pytest.raises(InputError, match='cannot be read'):
        ExitConfig.load(tmp_path / 'none.json')


def test_config_is_checked_against_the_network(small_msfuse):
    with pytest.raises(InputError, match='2 classes does not fit a network with 10'):
        small_config().check_network(small_msfuse)
    small_config(class_names=None).check_network(small_msfuse)
    two = timm.create_model('msfuse_cifar', **{**SMALL, 'steps': (2, 2)})
    with pytest.raises(InputError, match='3 exits does not fit a network with 2'):
        small_config().check_network(two)


def test_the_config_of_a_user_s_checkpoint_lies_beside_it(tmp_path):
    checkpoint = tmp_path / 'model.safetensors'
    with pytest.raises(InputError, match=f'no {FILE_NAME} beside'):
        load_exit_config('msfuse_cifar', checkpoint)
    small_config().save(tmp_path / FILE_NAME)
    assert load_exit_config('msfuse_cifar', checkpoint) == small_config()


@pytest.mark.parametrize('name, words', [
    ('msfuse', "unknown network 'msfuse'"),
    ('msfuse_cifar.imagenet', "unknown tag 'imagenet'"),
    ('local-dir:/nowhere', 'cannot be read'),
    ('ftp:somewhere', "unknown source 'ftp:'"),
    ('ranet_cifar_budgeted.cifar100', 'timm-multiexit calibrate'),
])
def test_names_without_a_config_are_refused(name, words):
    if (WEIGHTS_DIR / name / FILE_NAME).is_file():
        pytest.skip(f'{name} has policies')
    with pytest.raises(InputError, match=words):
        load_exit_config(name)


@pytest.mark.parametrize('name', [n for n in list_networks(pretrained=True)])
def test_packaged_weights_come_with_policies_from_the_cheapest_exit_to_the_full_cost(name):
    config, model = load_exit_config(name), load_model(name)
    config.check_network(model)
    costs = exit_costs(model)
    assert (config.exit_macs, config.exit_params, config.input_size) == (costs.macs, costs.params, costs.input_size)
    assert config.class_names == tuple(model.pretrained_cfg['label_names'])
    assert len(config.policies) >= 25
    assert (config.policies[0].budget, config.policies[-1].budget) == (costs.macs[0], costs.macs[-1])
    for p in config.policies:
        assert p.expected_macs == pytest.approx(p.budget, rel=0.005)
    logits = model.forward_exits(torch.rand(16, 3, 32, 32))
    assert simulate(config.policies[0], logits, costs.macs).average_macs == costs.macs[0]
    assert simulate(config.policies[-1], logits, costs.macs).average_macs == costs.macs[-1]
