"""The running app for its tests, with the shipped weights."""
import pytest
import torch
from examples import SAMPLES
from layout import build_page
from PIL import Image
from served import available_networks, get_network

import app as app_module

IMAGES = sorted(SAMPLES.glob('*.png'))


class Server:
    """The running app. `calls` counts the runs of the network, one per image."""

    def __init__(self):
        self.names = available_networks()
        self.network = get_network(self.names[0])
        self.calls = 0
        self.network.model.stages[0].register_forward_hook(self._count)
        self.page = build_page(self.names)
        self.url = self.page.launch(prevent_thread_lock=True, quiet=True, **app_module.launch_options())[1]

    def _count(self, *_):
        self.calls += 1

    def expected(self, path):
        """Probabilities of all exits (num_exits, num_classes), without the app."""
        from timm.data import create_transform, resolve_data_config
        model = self.network.model
        x = create_transform(**resolve_data_config(model=model))(Image.open(path).convert('RGB')).unsqueeze(0)
        with torch.inference_mode():
            logits = torch.cat(model.forward_exits(x))
        return (logits / torch.tensor(self.network.temperatures).unsqueeze(1)).softmax(1)


@pytest.fixture(scope='session')
def server():
    server = Server()
    yield server
    server.page.close()
