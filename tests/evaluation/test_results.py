"""results.json: one reader and one writer, and what is refused."""
import json

import pytest

from timm_multiexit.errors import InputError
from timm_multiexit.evaluation.results import Results
from timm_multiexit.models._pretrained import WEIGHTS_DIR

STORED = sorted(WEIGHTS_DIR.glob('*/results.json'))


def test_stored_results_are_read_and_written_back_byte_for_byte(tmp_path):
    assert len(STORED) >= 4
    for path in STORED:
        results = Results.load(path)
        assert results.model == path.parent.name
        results.save(tmp_path / 'results.json')
        assert (tmp_path / 'results.json').read_bytes() == path.read_bytes()
        assert Results.load(tmp_path / 'results.json') == results


@pytest.mark.parametrize('spoil', [
    lambda v: v.pop('exits'),
    lambda v: v.update(surprise=1),
    lambda v: v['exits'][0].pop('macs'),
    lambda v: v['budgeted'][0].update(surprise=1),
    lambda v: v.update(budgeted={'search': []}),
    lambda v: v.update(oracle=3),
])
def test_other_files_are_refused(tmp_path, spoil):
    values = json.loads(STORED[0].read_text())
    spoil(values)
    path = tmp_path / 'results.json'
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match='does not hold the results of timm-multiexit evaluate .*: evaluate again'):
        Results.load(path)
    path.write_text('[]')
    with pytest.raises(InputError, match='evaluate again'):
        Results.load(path)
    with pytest.raises(InputError, match='cannot be read'):
        Results.load(tmp_path / 'none.json')
