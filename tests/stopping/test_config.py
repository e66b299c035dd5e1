"""The exit config: the same in the package, beside a checkpoint and in config.json; the scores beside it."""
import dataclasses
import json

import numpy as np
import pytest
import timm
from conftest import PROJECT, SMALL
from killer import Killer

from timm_multiexit.errors import InputError, MissingFileError
from timm_multiexit.models._costs import exit_costs
from timm_multiexit.pretrained.exit_config import load_exit_config, load_recipe, weights_digest
from timm_multiexit.pretrained.load import load_model
from timm_multiexit.pretrained.names import list_networks
from timm_multiexit.stopping.config import FILE_NAME, SCORES_NAME, ExitConfig
from timm_multiexit.stopping.costs import ExitCosts, StageCosts
from timm_multiexit.stopping.simulate import simulate
from timm_multiexit.stopping.solve import budget_grid

MACS = (10_000_000, 20_000_000, 40_000_000)
COMPARED = [f'local-dir:{folder}' for folder in sorted((PROJECT / 'hub' / 'comparison').glob('*_cmp'))]


def small_config(**changes):
    rng = np.random.default_rng(0)
    targets = rng.integers(2, size=60)
    logits = rng.normal(size=(3, 60, 2)) + np.array([0.5, 1., 1.5])[:, None, None] * np.eye(2)[targets]
    config = ExitConfig.fit(logits, targets, ExitCosts(MACS, (1, 2, 3), (3, 32, 32)), ('cat', 'dog'),
                            certification=np.arange(60) >= 40, weights='abc')
    return dataclasses.replace(config, **changes)


def test_saved_configs_come_back_the_same(tmp_path):
    for number, config in enumerate((small_config(), small_config(class_names=None), small_config(scores=None))):
        path = tmp_path / str(number) / FILE_NAME
        config.save(path)
        assert ExitConfig.load(path) == config
        assert ExitConfig.from_dict(json.loads(json.dumps(config.to_dict())), config.scores) == config
    assert small_config() != small_config(scores=None) != small_config(weights='') != 'config'


def test_temperatures_are_fitted_on_development_images_alone():
    config = small_config()
    assert config.scores.development.num_images == 40 and config.scores.for_certification.num_images == 20
    rng = np.random.default_rng(0)
    targets = rng.integers(2, size=60)
    logits = rng.normal(size=(3, 60, 2)) + np.array([0.5, 1., 1.5])[:, None, None] * np.eye(2)[targets]
    assert config.temperatures == ExitConfig.fit(
        logits[:, :40], targets[:40], ExitCosts(MACS, (1, 2, 3), (3, 32, 32))).temperatures


def test_without_scores_no_policy_is_solved():
    with pytest.raises(InputError, match='no scores are stored with these weights: run timm-multiexit'):
        small_config(scores=None).policy_for(20e6)


def test_several_configs_in_a_folder_keep_their_scores(tmp_path):
    one, many = (small_config(scores=small_config().scores.subset(slice(n))) for n in (30, 60))
    one.save(tmp_path / 'one.json')
    many.save(tmp_path / 'many.json')
    assert ExitConfig.load(tmp_path / 'one.json') == one != many == ExitConfig.load(tmp_path / 'many.json')
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        'many.json', 'many.scores.safetensors', 'one.json', 'one.scores.safetensors']


def test_a_config_without_scores_leaves_none_of_an_earlier_one(tmp_path):
    small_config().save(tmp_path / FILE_NAME)
    small_config(scores=None).save(tmp_path / FILE_NAME)
    assert ExitConfig.load(tmp_path / FILE_NAME) == small_config(scores=None)
    assert [p.name for p in tmp_path.iterdir()] == [FILE_NAME]


def test_scores_of_other_weights_are_refused(tmp_path):
    small_config().save(tmp_path / FILE_NAME)
    small_config().scores.save(tmp_path / SCORES_NAME, 'others')
    with pytest.raises(InputError, match='are of other weights than'):
        ExitConfig.load(tmp_path / FILE_NAME)


def test_a_kill_leaves_a_calibration_whole_or_is_noticed(tmp_path):
    """Killed before each operation on files in turn, over an earlier calibration, and then made again."""
    old, new = small_config(), small_config(temperatures=(1., 2., 3.))
    with Killer(tmp_path) as operations:
        old.save(tmp_path / FILE_NAME)
    assert len(operations.done) >= 4
    found = []
    for k in range(len(operations.done)):
        with Killer(tmp_path, k):
            new.save(tmp_path / FILE_NAME)
        try:
            found.append(ExitConfig.load(tmp_path / FILE_NAME).temperatures)
        except InputError as error:  # scores come first: they are of the new temperatures, those beside them of the old
            assert 'are of another calibration than' in str(error)
            found.append(())
        assert found[-1] in (old.temperatures, ())
        new.save(tmp_path / FILE_NAME)
        assert ExitConfig.load(tmp_path / FILE_NAME).temperatures == new.temperatures
        old.save(tmp_path / FILE_NAME)
    assert found[0] == old.temperatures and found[-1] == ()


@pytest.mark.parametrize('spoil', [
    lambda data: b'', lambda data: data[:40], lambda data: data[:-10], lambda data: b'\xff' * 8 + data[8:],
    lambda data: data.replace(b'"labels"', b'"lables"'), lambda data: data.replace(b'F32', b'F64'),
    lambda data: data.replace(b'[3, 60]', b'[60, 3]', 1)])
def test_damaged_scores_are_refused(tmp_path, spoil):
    small_config().save(tmp_path / FILE_NAME)
    path = tmp_path / SCORES_NAME
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(InputError, match='scores .* cannot be read .*timm-multiexit calibrate'):
        ExitConfig.load(tmp_path / FILE_NAME)


@pytest.mark.parametrize('changes, words', [
    (dict(exit_macs=(10, 20)), '3 parameter counts'),
    (dict(exit_macs=(10, 20, 20)), 'rise from exit to exit'),
    (dict(exit_macs=(0, 20, 30)), 'numbers above 0'),
    (dict(temperatures=(1., 1.)), '2 temperatures'),
    (dict(exit_macs='all'), 'give a list'),
    (dict(version=1), 'version 1'),
    (dict(measure='luck'), "measure 'luck'"),
    (dict(temperatures=(1., 0., 1.)), 'numbers above 0'),
    (dict(exit_macs=(1, 2), exit_params=(1, 2), temperatures=(1., 1.)), 'scores of 3 exits'),
])
def test_values_that_do_not_fit_together_are_refused(changes, words):
    with pytest.raises(InputError, match=words):
        small_config(**changes)


@pytest.mark.parametrize('spoil', [
    lambda v: v.pop('exit_macs'),
    lambda v: v.pop('version'),
    lambda v: v.update(version=1),
    lambda v: v.update(surprise=1),
    lambda v: v.update(temperatures=[0.5]),
    lambda v: v.update(temperatures=None),
    lambda v: v.update(temperatures=[1., -1., 1.]),
    lambda v: v.update(exit_macs=['a', 'b', 'c']),
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
    with pytest.raises(InputError, match='of other weights than these'):
        small_config(class_names=None).check_network(small_msfuse, 'xyz')
    two = timm.create_model('msfuse_cifar', **{**SMALL, 'steps': (2, 2)})
    with pytest.raises(InputError, match='3 exits does not fit a network with 2'):
        small_config().check_network(two)


def test_the_config_of_a_user_s_checkpoint_lies_beside_it(tmp_path):
    checkpoint = tmp_path / 'model.safetensors'
    with pytest.raises(InputError, match=f'no {FILE_NAME} beside'):
        load_exit_config('msfuse_cifar', checkpoint)
    small_config().save(tmp_path / FILE_NAME)
    assert load_exit_config('msfuse_cifar', checkpoint) == small_config()


def test_no_config_is_told_from_one_that_cannot_be_read(tmp_path):
    for missing in (('msfuse_cifar', tmp_path / 'model.safetensors'), ('vgg8_mc_cifar.cifar100',)):
        with pytest.raises(MissingFileError):
            load_exit_config(*missing)
    (tmp_path / FILE_NAME).write_text('{')
    for wrong in (('msfuse_cifar', tmp_path / 'model.safetensors'), ('msfuse',)):
        with pytest.raises(InputError) as caught:
            load_exit_config(*wrong)
        assert not isinstance(caught.value, MissingFileError)


@pytest.mark.parametrize('name, words', [
    ('msfuse', "unknown network 'msfuse'"),
    ('msfuse_cifar.imagenet', "unknown tag 'imagenet'"),
    ('local-dir:/nowhere', 'cannot be read'),
    ('ftp:somewhere', "unknown source 'ftp:'"),
    ('vgg8_mc_cifar.cifar100', 'timm-multiexit calibrate'),
])
def test_names_without_a_config_are_refused(name, words):
    with pytest.raises(InputError, match=words):
        load_exit_config(name)


@pytest.mark.parametrize('name', [*list_networks(pretrained=True), *COMPARED])
def test_packaged_weights_come_with_scores_for_policies_from_the_cheapest_exit_to_the_full_cost(name):
    config, model = load_exit_config(name), load_model(name)
    config.check_network(model)
    costs = exit_costs(model)
    assert (config.exit_macs, config.exit_params, config.input_size) == (costs.macs, costs.params, costs.input_size)
    assert config.class_names == tuple(model.pretrained_cfg['label_names'])
    assert config.weights == weights_digest(model)
    recipe = load_recipe(name)
    assert config.scores.development.num_images == recipe['validation_images']
    assert config.scores.for_certification.num_images == (recipe.get('certification_images') or 0)
    for budget in budget_grid(costs.macs[0], costs.macs[-1], 9):
        assert budget * 0.995 < config.policy_for(budget).expected_macs <= budget + 1


def test_a_promise_is_kept_by_the_cheapest_policy_that_can_make_it():
    rng = np.random.default_rng(0)
    targets = rng.integers(4, size=6000)
    logits = rng.normal(size=(3, 6000, 4)) + np.array([2., 2.5, 3.])[:, None, None] * np.eye(4)[targets]
    config = ExitConfig.fit(logits, targets, ExitCosts(MACS, (1, 2, 3), (3, 32, 32)),
                            certification=np.arange(6000) >= 2000)
    policies = [config.policy_for(max_loss=loss) for loss in (1., 3., 10.)]
    macs = [p.expected_macs for p in policies]
    assert macs == sorted(macs, reverse=True) and macs[0] < MACS[-1]
    assert policies[0].promise == ('at most 1 points less accurate than the full network, with certainty 0.95, for '
                                   'images like the 4,000 certification images')
    full = 100. * (logits[-1].argmax(1) == targets).mean()
    for policy, loss in zip(policies, (1., 3., 10.)):
        assert full - simulate(policy, logits, MACS).accuracy(targets) <= loss
    slow_first = StageCosts((3., 0.2, 0.2), (0., 0., 0.))
    assert config.policy_for(max_loss=3., profile=slow_first).expected_ms <= slow_first.full
    with pytest.raises(InputError, match=r'at most 0.01 points cannot be promised .* ask for \d\.\d\d points or more'):
        config.policy_for(max_loss=0.01)
    for certainty in (0., 1., 1.5):
        with pytest.raises(InputError, match='give a probability between 0 and 1'):
            config.policy_for(max_loss=1., certainty=certainty)
    with pytest.raises(InputError, match="unknown risk 'regret'"):
        config.policy_for(max_loss=1., risk='regret')


def test_budgets_are_texts_too(tmp_path):
    """'25M', '2ms' and '50%' mean what they mean on the command line; a file of calibrate is loaded by its path."""
    config = load_exit_config('msfuse_cifar')
    assert config.policy_for('25M') == config.policy_for(25e6)
    profile = StageCosts((1.,) * 7, (0.5,) * 7)
    assert config.policy_for(average_ms='50%', profile=profile) == config.policy_for(average_ms=3.75, profile=profile)
    assert config.policy_for(average_ms='3ms', profile=profile) == config.policy_for(average_ms=3., profile=profile)
    for wrong in (dict(average_budget='lots'), dict(average_ms='soon', profile=profile)):
        with pytest.raises(InputError, match='write it like'):
            config.policy_for(**wrong)
    for wrong in (0, -1., float('nan')):
        with pytest.raises(InputError, match='write it like'):
            config.policy_for(average_ms=wrong, profile=profile)
    config.save(tmp_path / 'mine.json')
    assert load_exit_config(str(tmp_path / 'mine.json')).policy_for('25M') == config.policy_for('25M')
