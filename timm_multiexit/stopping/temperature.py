"""Temperature scaling (Guo et al., ICML 2017): one number per exit that calibrates its probabilities."""
import numpy as np

from .policy import as_array

# A fit that runs into these bounds means that the logits carry no probabilities (no error at all, or chance).
_TEMPERATURES = (0.05, 20.)
_TOLERANCE = 1e-7


def fit_temperature(logits: np.ndarray, targets: np.ndarray) -> float:
    """The temperature that minimises the negative log likelihood of one exit (Guo et al., ICML 2017, section 4.2).

    The loss is convex in the inverse temperature: Newton's method, with bisection where a step leaves the bracket.

    Args:
        logits: (N, num_classes), an array or a tensor.
        targets: int64 (N,), likewise.

    Returns:
        The divisor of the logits, from 0.05 to 20.
    """
    logits, targets = as_array(logits).astype(np.float64), as_array(targets)
    margins = logits - logits[np.arange(len(targets)), targets, None]  # over the logit of the label
    largest = margins.max(1, keepdims=True)
    low, high = (1. / t for t in reversed(_TEMPERATURES))
    inverse = 1.
    while high - low > _TOLERANCE * low:
        p = np.exp(inverse * (margins - largest))
        p /= p.sum(1, keepdims=True)
        mean = (p * margins).sum(1)
        slope = mean.mean()
        if slope > 0.:
            high = inverse
        else:
            low = inverse
        curvature = ((p * margins ** 2).sum(1) - mean ** 2).mean()
        step = -slope / curvature if curvature > 0. else np.inf
        if abs(step) < _TOLERANCE * inverse:
            break
        inverse = inverse + step if low < inverse + step < high else (low * high) ** 0.5
    return float(1. / inverse)
