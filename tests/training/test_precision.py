"""Training on CPUs that emulate bfloat16 runs in float32, Muon included."""
import subprocess
import sys

import pytest
import torch
from conftest import PROJECT
from safetensors.torch import load_file
from timm.optim import create_optimizer_v2, muon

from timm_multiexit.training.precision import muon_in_float32, slow_bfloat16

pytest_plugins = ['training_support']  # folder_dataset
CPU = torch.device('cpu')
# The patched capabilities hold for a whole process, so the script runs in its own.
ON_A_CPU_WITHOUT = """
import runpy, sys, torch
torch.cpu.get_capabilities = lambda: {'avx2': True}
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.mark.parametrize('machine, has, slow', [
    ('x86_64', {'avx2': True}, True), ('AMD64', {'avx512_f': True, 'avx512_bf16': False}, True),
    ('x86_64', {'avx512_f': True, 'avx512_bf16': True}, False), ('x86_64', {'amx_bf16': True}, False),
    ('aarch64', {}, False),
])
def test_which_cpus_have_bfloat16(monkeypatch, machine, has, slow):
    monkeypatch.setattr('platform.machine', lambda: machine)
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: has)
    assert slow_bfloat16(CPU) is slow
    assert not slow_bfloat16(torch.device('cuda'))


def test_muon_orthogonalises_in_float32(monkeypatch):
    usual_step = muon.zeropower_via_newtonschulz  # another test of this process may have changed it already
    monkeypatch.setattr(muon, 'zeropower_via_newtonschulz', getattr(usual_step, 'func', usual_step))
    gradient = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))

    def update():
        parameter = torch.nn.Parameter(torch.zeros(24, 40))
        parameter.grad = gradient.clone()
        create_optimizer_v2([parameter], 'nmuon', lr=1., weight_decay=0., momentum=0.).step()
        return parameter.detach()

    def rounded(x):
        return torch.equal(x / x.abs().max(), (x / x.abs().max()).bfloat16().float())

    usual = update()
    muon_in_float32()
    muon_in_float32()  # a second call changes nothing
    precise = update()
    scale = precise.norm() / usual.norm()
    assert 0.98 < scale < 1.02 and (precise - usual).norm() < 0.05 * usual.norm()
    assert not torch.equal(precise, precise.bfloat16().float()) and not rounded(precise)
    singular = torch.linalg.svdvals(precise)
    assert singular.max() / singular.min() < 2


def test_amp_on_such_a_cpu_equals_float32(folder_dataset, tmp_path):
    """The recipes enable autocast; where it would cost time they train in float32 and log a warning."""
    finals = []
    for extra in (['--amp'], []):
        output = tmp_path / f'run{len(finals)}'
        done = subprocess.run(
            [sys.executable, '-c', ON_A_CPU_WITHOUT, str(PROJECT / 'train_timm.py'), '--data-dir', str(folder_dataset),
             '--dataset', 'folder', '--num-classes', '2', '--model', 'msfuse_cifar', '--output', str(output),
             '--experiment', 'run', '--model-kwargs', 'steps=(1,1,1)', 'base_width=8', 'growth=4', 'head_width=16',
             '--epochs', '1', '--batch-size', '64', '--validation-images', '40', '--threads', '1', '--device', 'cpu',
             *extra], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert ('no bfloat16' in done.stderr) is bool(extra)
        finals.append(load_file(output / 'run' / 'final' / 'model.safetensors'))
        assert 'amp: false' in (output / 'run' / 'final' / 'recipe.yaml').read_text()
    assert all(torch.equal(finals[0][k], finals[1][k]) for k in finals[1])


