"""Fixtures. Real CIFAR files lie in the folder that TIMM_MULTIEXIT_DATA names, else in .data, else they are fetched."""
import os
from pathlib import Path

import pytest
import timm
import torch

import timm_multiexit  # noqa: F401 - registers the networks
from timm_multiexit.pretrained.names import list_networks

pytest.register_assert_rewrite('hub_support')
PROJECT = Path(__file__).resolve().parent.parent
SAMPLES = PROJECT / 'timm_multiexit' / 'samples'

# Small, and still with every part of the real thing: three scales, two transitions, an exit in each block.
SMALL = dict(steps=(2, 2, 2), base_width=8, growth=4, head_width=16)


@pytest.fixture(scope='session')
def cifar_root() -> str:
    """Folder with cifar-10-batches-py and cifar-100-python, as torchvision reads them."""
    from torchvision.datasets import CIFAR10, CIFAR100
    root = os.environ.get('TIMM_MULTIEXIT_DATA') or str(PROJECT / '.data')
    for dataset in (CIFAR10, CIFAR100):
        try:
            dataset(root, download=False)
        except RuntimeError:
            if 'TIMM_MULTIEXIT_DATA' in os.environ:
                raise
            try:
                dataset(root, download=True)
            except OSError as error:
                pytest.skip(f'CIFAR is not in {root} and cannot be fetched ({error}); set TIMM_MULTIEXIT_DATA')
    return root


@pytest.fixture
def small_msfuse():
    """A small MSFuse with fixed random weights, in eval mode."""
    torch.manual_seed(0)
    return timm.create_model('msfuse_cifar', **SMALL).eval()


@pytest.fixture(params=list_networks())
def network(request):
    """Every registered network of the package, with fixed random weights, in eval mode."""
    torch.manual_seed(0)
    return timm.create_model(request.param).eval()
