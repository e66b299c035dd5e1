"""Promises over random splits: kept by the test, broken by the plug-in rule."""
import numpy as np
import pytest
import torch

from timm_multiexit.errors import InputError
from timm_multiexit.evaluation.evaluate import LabelledLogits
from timm_multiexit.evaluation.guarantee_check import check_guarantees
from timm_multiexit.stopping.costs import ExitCosts
from timm_multiexit.stopping.policy import ALWAYS, ExitPolicy, log_odds

COSTS = ExitCosts((10, 20), (1, 2), (3, 32, 32))


def logits_of(confident, correct, labels):
    """Logits of 3 classes whose largest probability rises with `confident` and is that of the label if `correct`."""
    classes = np.where(correct, labels, (labels + 1) % 3)
    return (np.eye(3)[classes] * (0.5 + 4. * confident[:, None])).astype(np.float32)


@pytest.fixture(scope='module')
def test_set():
    rng = np.random.default_rng(0)
    labels, confident = rng.integers(0, 3, 20_000), rng.random(20_000)
    first = rng.random(20_000) > 0.03 * (1. - confident)  # errors where it is less confident
    last = np.ones(20_000, bool)
    logits = np.stack([logits_of(confident, correct, labels) for correct in (first, last)])
    return LabelledLogits(torch.from_numpy(logits), torch.from_numpy(labels))


CANDIDATES = [ExitPolicy((log_odds(c), ALWAYS), (1., 1.)) for c in np.linspace(0.95, 0.4, 20)]


@pytest.mark.parametrize('risk', ['accuracy', 'harm', 'consistency'])
def test_promises_are_kept_where_the_plug_in_rule_breaks_them(test_set, risk):
    half, one = check_guarantees(CANDIDATES, test_set, COSTS, risk, max_losses=(0.5, 1.), images=2000, splits=100)
    for check in (half, one):
        assert check.broken <= 0.05 < 0.15 < check.plug_in_broken
        assert check.nothing < 0.5
    assert one.median_macs < half.median_macs < 20.


def test_images_must_be_left_to_check_on(test_set):
    with pytest.raises(InputError, match='20000 of 20000'):
        check_guarantees(CANDIDATES, test_set, COSTS, images=20_000)
