"""For tests of the app's pages: a reader of their HTML, and an exit config."""
from html.parser import HTMLParser

import torch

from timm_multiexit.stopping.config import ExitConfig
from timm_multiexit.stopping.costs import ExitCosts

MACS = (10_000_000, 20_000_000, 24_000_000, 40_000_000)
VOID = {'img', 'line', 'rect', 'circle', 'path'}


class Tree(HTMLParser):
    """Checks that every element is closed, and collects start tags and text."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.tags, self.text = [], [], ''
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def classes(self, tag):
        return [attrs.get('class', '') for name, attrs in self.tags if name == tag]


def make_config(certification: int = 0) -> ExitConfig:
    """An exit config of four exits, of 400 made-up images and some for a guarantee."""
    torch.manual_seed(3)
    images = 400 + certification
    targets = torch.randint(3, (images,))
    logits = torch.randn(4, images, 3) + torch.tensor([1., 1.5, 2., 2.5]).view(4, 1, 1) * torch.eye(3)[targets]
    return ExitConfig.fit(
        logits, targets, ExitCosts(MACS, (1, 2, 3, 4), (3, 32, 32)), ('cat', 'dog', 'pickup_truck'),
        certification=torch.arange(images) >= 400 if certification else None)
