"""Policies: confidence measures, the decision to stop, saving and loading, and what is refused."""
import math

import numpy as np
import pytest
import torch

from timm_multiexit.errors import InputError
from timm_multiexit.files import written_beside
from timm_multiexit.stopping.agreement import Agreement
from timm_multiexit.stopping.policy import (
    ALWAYS,
    MEASURES,
    NEVER,
    ExitPolicy,
    confidence,
    log_odds,
    probability,
    scores,
)
from timm_multiexit.stopping.simulate import simulate

MACS = (10_000_000, 25_000_000, 40_000_000)


def log_of(*rows):
    return torch.tensor(rows).log()


def random_logits(images=500, classes=5, exits=3, seed=0):
    return 2. * torch.randn(exits, images, classes, generator=torch.Generator().manual_seed(seed))


def test_measures_on_known_probabilities():
    logits = log_of((0.7, 0.2, 0.1), (0.4, 0.4, 0.2))
    torch.testing.assert_close(confidence(logits), torch.tensor([0.7, 0.4]))
    torch.testing.assert_close(confidence(logits, 'margin'), torch.tensor([0.5, 0.]), atol=1e-6, rtol=0)
    entropy = [-sum(p * math.log(p) for p in row) for row in ((0.7, 0.2, 0.1), (0.4, 0.4, 0.2))]
    torch.testing.assert_close(confidence(logits, 'entropy'), torch.tensor([1. - e / math.log(3) for e in entropy]))


@pytest.mark.parametrize('measure', MEASURES)
def test_measures_end_at_certainty_and_fall_with_temperature(measure):
    certain = torch.tensor([[200., 0., 0.]])
    assert float(confidence(certain, measure)) == pytest.approx(1.)
    logits = random_logits()[0]
    sharp, flat = confidence(logits, measure, 1.), confidence(logits, measure, 3.)
    assert (flat < sharp).all() and (flat >= 0).all()
    lowest = float(confidence(torch.zeros(1, 4), measure))
    assert lowest == pytest.approx(0.25 if measure == 'max_softmax' else 0., abs=1e-6)


def test_bfloat16_logits_are_measured_in_float32():
    logits = random_logits()[0].bfloat16()
    assert confidence(logits).dtype == torch.float32
    assert torch.equal(confidence(logits), confidence(logits.float()))


@pytest.mark.parametrize('logits, words', [
    (torch.zeros(0, 10), 'empty batch'),
    (torch.zeros(4, 1), 'two or more classes'),
    (torch.zeros(10), 'two or more classes'),
    (torch.tensor([[0., float('nan')], [0., 1.]]), '1 of 2 images have NaN'),
    (torch.tensor([[0., float('inf')]]), 'NaN or infinite'),
])
def test_logits_without_a_confidence_are_refused(logits, words):
    for measure in MEASURES:
        with pytest.raises(InputError, match=words):
            confidence(logits, measure)


def test_unknown_measure_is_refused():
    with pytest.raises(InputError, match="'sharpness': choose one of max_softmax"):
        confidence(torch.zeros(2, 3), 'sharpness')


@pytest.mark.parametrize('measure', MEASURES)
def test_simulation_is_a_walk_through_the_exits_image_by_image(measure):
    logits = random_logits()
    policy = ExitPolicy((log_odds(0.6), log_odds(0.5), ALWAYS), (0.8, 1.3, 1.), measure)
    result = simulate(policy, list(logits), MACS)
    assert {0, 1, 2} == set(result.exit_index.tolist())
    for n in range(logits.shape[1]):
        for k in range(3):
            c = confidence(logits[k, n:n + 1], measure, policy.temperatures[k])
            if k == 2 or float(c) >= (0.6, 0.5)[k]:
                break
        assert result.exit_index[n] == k and result.macs[n] == MACS[k]
        assert result.prediction[n] == logits[k, n].argmax()
        assert float(result.confidence[n]) == pytest.approx(float(c), abs=1e-6)
    counts = [(result.exit_index == k).sum().item() for k in range(3)]
    assert result.exit_shares(3) == pytest.approx([c / 500 for c in counts])
    assert result.average_macs == pytest.approx(sum(c * m for c, m in zip(counts, MACS)) / 500)
    targets = result.prediction.copy()
    targets[:50] = (targets[:50] + 1) % 5
    assert result.accuracy(targets) == pytest.approx(90.)


@pytest.mark.parametrize('measure', MEASURES)
def test_scores_are_the_log_odds_of_confidences_and_never_saturate(measure):
    logits = random_logits()[0]
    odds = confidence(logits, measure).double()
    torch.testing.assert_close(scores(logits, measure).double(), (odds / (1. - odds)).log(), atol=0.02, rtol=0.)
    certain = np.array([[m, 0., 1.] for m in (20., 30., 60., 300., 3000.)])
    rising = scores(certain, measure)
    assert (np.diff(rising) > 0.).all() or measure == 'entropy' and (np.diff(rising)[:3] > 0.).all()
    assert np.isfinite(scores(np.array([[1e4, -1e4], [0., 0.]]), measure)).all()


def test_the_score_of_the_largest_probability_is_exact_far_beyond_float32():
    z = np.array([[50., 3., 1., -2.]])
    assert scores(z)[0] == pytest.approx(50. - math.log(sum(math.exp(v) for v in (3., 1., -2.))), rel=1e-6)
    assert scores(z, temperature=2.)[0] == pytest.approx(25. - math.log(sum(math.exp(v / 2) for v in (3., 1., -2.))))


def test_log_odds_turn_confidences_round():
    for c in (1e-6, 0.3, 0.5, 0.99):
        assert float(probability(log_odds(c))) == pytest.approx(c)
    assert ALWAYS < log_odds(0.) < -1e6 and NEVER > log_odds(1.) > 1e6


def test_one_threshold_is_never_reached_and_one_always():
    certain = torch.tensor([[1e8, 0.], [50., 0.]])
    assert not ExitPolicy((NEVER, ALWAYS), (1., 1.)).decide(0, certain).leaves.any()
    assert ExitPolicy((ALWAYS, ALWAYS), (1., 1.)).decide(0, torch.zeros(3, 2)).leaves.all()
    assert ExitPolicy((NEVER, NEVER), (1., 1.)).decide(1, certain).leaves.all()  # the last exit takes all


def test_a_confidence_for_all_exits():
    policy = ExitPolicy.at_confidence(0.9, (1., 2.))
    assert policy.confidence_at(0) == pytest.approx(0.9) and policy.thresholds[1] == ALWAYS
    logits = np.log([[0.91, 0.09], [0.89, 0.11]])
    assert policy.decide(0, logits).leaves.tolist() == [True, False]
    with pytest.raises(InputError, match='above 0 and up to 1'):
        ExitPolicy.at_confidence(1.2, (1., 1.))


def test_a_policy_for_another_network_is_refused():
    policy = ExitPolicy((0.6, 0.), (1., 1.))
    with pytest.raises(InputError, match='2 exits does not fit a network with 3'):
        simulate(policy, random_logits(), MACS)
    with pytest.raises(InputError, match='3 exits does not fit a network with 2'):
        simulate(ExitPolicy((0.6, 0.5, 0.), (1.,) * 3), random_logits(exits=2), MACS[:2])
    with pytest.raises(InputError, match='does not fit'):
        simulate(policy, random_logits(exits=2), MACS)


@pytest.mark.parametrize('values, words', [
    (dict(thresholds=(), temperatures=()), 'one number per exit'),
    (dict(thresholds=(float('nan'), 0.), temperatures=(1., 1.)), 'thresholds'),
    (dict(thresholds=(-2e9, 0.), temperatures=(1., 1.)), 'all images leave'),
    (dict(thresholds=('high', 0.), temperatures=(1., 1.)), 'give numbers'),
    (dict(thresholds=(0.5, 0.), temperatures=(1.,)), '2 numbers above 0'),
    (dict(thresholds=(0.5, 0.), temperatures=(1., 0.)), 'above 0'),
    (dict(thresholds=(0.5, 0.), temperatures=(1., 1.), exit_shares=(1.,)), '1 exit shares for 2'),
    (dict(thresholds=(0.5, 0.), temperatures=(1., 1.), measure='luck'), "'luck'"),
    (dict(thresholds=(0.5, 0.), temperatures=(1., 1.), expected_ms='much'), 'give numbers'),
])
def test_values_that_are_no_policy_are_refused(values, words):
    with pytest.raises(InputError, match=words):
        ExitPolicy(**values)


FULL = ExitPolicy(
    (2.912345678901, NEVER, ALWAYS), (0.8, 1.1, 1.05), 'margin', 24.9e6, 2.5, 93.21, (0.5, 0., 0.5), 'at most 0.5')


def test_saved_policies_come_back_the_same(tmp_path):
    for policy in (FULL, ExitPolicy([0.9, 0], [1, 1])):
        path = tmp_path / 'policies' / 'policy.json'
        policy.save(path)
        assert ExitPolicy.load(path) == policy
        assert [p.name for p in path.parent.iterdir()] == ['policy.json']


@pytest.mark.parametrize('text', ['', '{', '[]', '{"thresholds": [1]}', 'null', '{"thresholds": [0.5, 0], "x": 1}'])
def test_files_that_are_no_policy_are_refused(tmp_path, text):
    path = tmp_path / 'policy.json'
    path.write_text(text)
    with pytest.raises(InputError):
        ExitPolicy.load(path)
    with pytest.raises(InputError, match='cannot be read'):
        ExitPolicy.load(tmp_path / 'none.json')


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / 'policy.json'
    FULL.save(path)
    with pytest.raises(KeyboardInterrupt), written_beside(path) as partial:
        partial.write_text('{"thresholds": [0.')
        raise KeyboardInterrupt
    assert ExitPolicy.load(path) == FULL
    assert [p.name for p in tmp_path.iterdir()] == ['policy.json']


def test_a_place_that_cannot_be_written_is_an_input_error(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(InputError, match='cannot be written'):
        FULL.save(tmp_path / 'file' / 'policy.json')


@pytest.mark.parametrize('measure', MEASURES)
def test_arrays_and_tensors_are_decided_alike_to_the_last_bit(measure):
    logits = 4. * random_logits()[0]
    policy = ExitPolicy((0.7, 0.), (1.3, 1.), measure)
    tensors, arrays = policy.decide(0, logits), policy.decide(0, logits.numpy())
    assert isinstance(tensors.confidence, torch.Tensor) and isinstance(arrays.confidence, np.ndarray)
    assert tensors.confidence.tolist() == arrays.confidence.tolist()
    assert tensors.leaves.tolist() == arrays.leaves.tolist()


def test_confidence_is_that_of_pytorch():
    logits = 5. * random_logits()[1]
    p = logits.softmax(1)
    torch.testing.assert_close(confidence(logits), p.amax(1), atol=1e-6, rtol=0)
    top = p.topk(2, 1).values
    torch.testing.assert_close(confidence(logits, 'margin'), top[:, 0] - top[:, 1], atol=1e-6, rtol=0)
    entropy = 1. - torch.special.entr(p).sum(1) / math.log(p.shape[1])
    torch.testing.assert_close(confidence(logits, 'entropy'), entropy, atol=1e-6, rtol=0)


@pytest.mark.parametrize('thresholds, used', [
    ((0.5, 0.4, ALWAYS), (0, 1, 2)), ((NEVER, 0.4, ALWAYS), (1, 2)), ((NEVER, NEVER, ALWAYS), (2,)),
    ((0.5, ALWAYS, ALWAYS), (0, 1)), ((ALWAYS, ALWAYS, ALWAYS), (0,)), ((NEVER, ALWAYS, 0.5), (1,))])
def test_exits_in_use_are_those_where_images_can_leave(thresholds, used):
    assert ExitPolicy(thresholds, (1.,) * 3).exits_in_use == used


def test_a_rule_with_a_memory_sees_the_rows_of_its_own_images():
    logits = random_logits().numpy()
    result = simulate(Agreement(3), logits, MACS)
    said = logits.argmax(2)
    expected = np.where(said[0] == said[1], 1, 2)
    assert set(expected) == {1, 2} and result.exit_index.tolist() == expected.tolist()
    assert result.prediction.tolist() == said[expected, np.arange(said.shape[1])].tolist()


def test_agreement_counts_repeats_of_the_answer_before():
    """By hand: three images whose four exits say 0 0 0 1, 0 1 1 1 and 0 1 0 0."""
    said = np.array([[0, 0, 0, 1], [0, 1, 1, 1], [0, 1, 0, 0]])
    logits = np.eye(3, dtype=np.float32)[said.T]
    costs = (1, 2, 3, 4)
    assert simulate(Agreement(4, 1), logits, costs).exit_index.tolist() == [1, 2, 3]
    assert simulate(Agreement(4, 2), logits, costs).exit_index.tolist() == [2, 3, 3]
    assert simulate(Agreement(4, 3), logits, costs).exit_index.tolist() == [3, 3, 3]
    decision = Agreement(4).decide(1, torch.from_numpy(logits[1]), torch.tensor([[0, 0], [0, 0], [0, 0]]))
    assert decision.leaves.tolist() == [True, False, False] and decision.memory.tolist() == [[0, 1], [1, 0], [1, 0]]
    for patience in (0, 4):
        with pytest.raises(InputError, match=f'a patience of {patience} with 4 exits: give a number from 1 to 3'):
            Agreement(4, patience)
