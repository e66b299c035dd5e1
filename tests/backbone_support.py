"""Backbones whose logits depend on the image, and the comparison of logits with them."""
import timm
import torch
import torch.nn.functional as F
from torch import nn


def photos(count, size):
    """Images (count, C, H, W) that differ as photos do, in colour, contrast and shapes: noise would pool away."""
    chans, height, width = size
    coarse = F.interpolate(torch.randn(count, chans, 4, 4), (height, width), mode='bilinear')
    return coarse * torch.rand(count, 1, 1, 1).mul(2) + 0.3 * torch.randn(count, chans, height, width) \
        + torch.randn(count, chans, 1, 1)


@torch.no_grad()
def enliven(model, size):
    """Draws every weight, and fits BN statistics to images; an untrained network hardly looks at its image."""
    for name, p in model.named_parameters():
        if p.ndim > 1 and min(p.shape[:2]) > 1:
            p.normal_(0, (2 / max(1, p[0].numel())) ** 0.5)
        elif name.endswith('bias'):
            p.normal_(0, 0.1)
        else:  # scales, tokens
            p.uniform_(0.5, 1.5)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.momentum = 1.
    if norms:
        model.train()(photos(8, size))
        for m in norms:  # and then not quite those of any batch
            m.running_mean.add_(0.1 * torch.randn_like(m.running_mean) * m.running_var.sqrt())
            m.running_var.mul_(torch.empty_like(m.running_var).uniform_(0.8, 1.25))
    for m, momentum in zip(norms, momenta):
        m.momentum = momentum
    return model.eval()


def lively(name, size=None, **kwargs):
    """A backbone and the size (C, H, W) of images for it."""
    model = timm.create_model(name, **kwargs)
    size = size or tuple(model.pretrained_cfg['input_size'])
    model.pretrained_cfg = dict(model.pretrained_cfg, input_size=size)  # for which it is cut
    return enliven(model, size), size


def difference(ours, theirs):
    """The largest difference of logits (B, N), relative to their spread over images, which must be there."""
    spread = theirs.double().std(0).mean().item()
    assert spread > 1e-2, f'the logits hardly depend on the image: spread {spread:.1e}'
    return (ours.double() - theirs.double()).abs().max().item() / spread


@torch.no_grad()
def exits_with_drops(net, images):
    """Logits of every exit, and the indices of the images that were still there: one leaves after each stage."""
    left, state, logits = torch.arange(len(images)), [images], []
    for k, (stage, head) in enumerate(zip(net.stages, net.exits)):
        state = stage(state)
        logits.append((left, head(state[-1])))
        if len(left) > 1:
            keep = torch.arange(len(left)) != k % len(left)
            left, state = left[keep], [x[keep] for x in state]
    return logits
