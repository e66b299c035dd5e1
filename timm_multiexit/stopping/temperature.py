"""Temperature scaling (Guo et al., ICML 2017): one number per exit that makes its probabilities honest."""
import torch
import torch.nn.functional as F

# Beyond these a fit says that the logits hold no probabilities at all (all right, or chance).
_TEMPERATURES = (0.05, 20.)


def fit_temperature(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """The temperature that makes one exit's softmax most likely (Guo et al., ICML 2017, section 4.2).

    Args:
        logits: (N, num_classes).
        targets: int64 (N,).

    Returns:
        What the logits are to be divided by, from 0.05 to 20.
    """
    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    logits = logits.detach().cpu().double()
    targets = targets.cpu()
    optimizer = torch.optim.LBFGS([log_t], max_iter=50, line_search_fn='strong_wolfe')

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(logits / log_t.clamp(-4., 4.).exp(), targets)
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    low, high = _TEMPERATURES
    return min(max(float(log_t.detach().exp()), low), high)
