"""Exported programs in a chain are the network."""
import pytest
import timm
import torch
from conftest import SMALL_NETWORKS

from timm_multiexit.inference.programs import export_programs


@pytest.mark.parametrize('name', ['msfuse_cifar', 'resnet62_mc_cifar',
                                  pytest.param('ranet_cifar', marks=pytest.mark.slow('15 s: many maps'))])
def test_a_chain_of_programs_gives_every_exit(name):
    torch.manual_seed(0)
    model = timm.create_model(name, **SMALL_NETWORKS[name]).eval()
    programs = export_programs(model)
    for batch in (1, 5):
        x = torch.randn(batch, 3, 32, 32)
        state, logits = (x,), []
        with torch.no_grad():
            for stage, head in programs:
                state = stage.module()(*state)
                logits.append(head.module()(state[-1]))
            for ours, theirs in zip(logits, model.forward_exits(x)):
                torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
