"""A direct search for thresholds: best validation accuracy within an average cost, guarded against overfitting.

For a price of computation, coordinate descent maximises mean(value - price * cost): with the other exits' thresholds
fixed, the best threshold of one exit is the largest prefix sum over the images sorted by confidence. Prices from high
through zero to negative give a path from the cheapest exit to the full cost. Three things keep a few thousand images
from being memorised:

* The value of an answer is mostly the probability that a calibrated mixture of all exits gives it, and only partly
  whether it is correct, which is one noisy bit.
* The path is the mean of several, each on a random reweighting of the images, and its thresholds rise with the cost.
* How far to move from the geometric rule's thresholds towards this path is chosen by cross-validation, separately for
  each range of budgets, and only as far as the gain is significant.
"""
import dataclasses
from typing import List, Sequence, Tuple

import numpy as np

from .geometric import solve_geometric
from .policy import NEVER, leaves
from .scores import Quantiles, Scores, interpolate, lerp, thresholds_at

LABEL_WEIGHT = 0.3  # of the labels in an answer's value
REWEIGHTINGS = 6
FOLDS = 5
MIXTURES = (0., 0.25, 0.5, 0.75, 1.)  # 0 is the geometric rule
WINDOW = 7  # budgets of the grid over which gains are averaged
STANDARD_ERRORS = 2.  # by which a gain must exceed 0 to count
# Images that have left earlier keep this little weight at an exit: enough to set a threshold that no image reaches.
ABSENT_WEIGHT = 0.02
RARE_SHARE = 0.005
GRID = 40
_INDEX = np.arange(GRID)
_NEAR = np.abs(_INDEX - _INDEX[:, None]) <= WINDOW // 2


def mixture_values(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Value of each exit's answer: its probability under a mixture of all exits, blended with whether it is correct.

    The mixture is softmax(sum_k w_k logits_k) with one weight per exit, fitted by Newton's method.

    Args:
        logits: float32 (num_exits, N, num_classes).
        targets: int64 (N,).

    Returns:
        float32 (num_exits, N).
    """
    answers = logits.argmax(2)
    probabilities = _mixture(logits, targets)
    soft = np.take_along_axis(probabilities, answers.T, 1).T
    return lerp(soft, answers == targets, LABEL_WEIGHT).astype(np.float32)


def _mixture(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Probabilities of the fitted mixture, float64 (N, num_classes)."""
    num_exits, images, _ = logits.shape
    labels = np.take_along_axis(logits, targets[None, :, None], 2)
    margins = (logits - labels).astype(np.float64)  # over the logit of the label
    penalty = 1e-3  # only keeps the weights of near-equal exits from growing with opposite signs

    def evaluate(weights):
        x = np.tensordot(weights, margins, 1)
        largest = x.max(1, keepdims=True)
        p = np.exp(x - largest)
        total = p.sum(1, keepdims=True)
        return (largest + np.log(total)).mean() + penalty * weights @ weights, p / total

    weights = np.full(num_exits, 1. / num_exits)
    loss, p = evaluate(weights)
    for _ in range(30):
        weighted = margins * p
        means = weighted.sum(2)
        slope = means.mean(1) + 2 * penalty * weights
        flat = (num_exits, -1)
        curvature = (weighted.reshape(flat) @ margins.reshape(flat).T - means @ means.T) / images
        step = np.linalg.solve(curvature + 2 * penalty * np.eye(num_exits), slope)
        decrease = slope @ step
        if decrease < 1e-9:
            break
        size = 1.
        while (trial := evaluate(weights - size * step))[0] > loss - 0.25 * size * decrease and size > 1e-6:
            size /= 2
        weights, (loss, p) = weights - size * step, trial
    return p


def prices() -> np.ndarray:
    """Prices of the full cost in units of accuracy, from high to low; below zero, computation is rewarded."""
    positive = np.logspace(0.5, -4, 32, dtype=np.float32)
    return np.concatenate([positive, np.zeros(1, np.float32), -positive[::-1]])


def descend(scores: Scores, weights: np.ndarray, start: np.ndarray, sweeps: int = 8) -> np.ndarray:
    """Coordinate descent for all prices at once.

    Args:
        scores: Of the validation images.
        weights: Of the images, float32 (N,).
        start: Thresholds float32 (P, num_exits - 1), one row per price.
        sweeps: At most so many times over all exits.

    Returns:
        Thresholds like `start`.
    """
    confidences, costs = scores.confidences, scores.costs.astype(np.float32)
    last = len(costs) - 1
    price = prices()[:, None]
    rows = np.take_along_axis(confidences, scores.order, 1)[:-1]
    # cuts[k][i] lets the i most confident images leave.
    cuts = np.pad((rows[:, 1:] + rows[:, :-1]) / 2, ((0, 0), (1, 1)), constant_values=((0., 0.), (NEVER, 0.)))
    net = [scores.values[k] - price * costs[k] for k in range(last + 1)]
    gain = np.zeros((len(price), scores.num_images + 1), np.float32)
    thresholds = start.copy()
    for _ in range(sweeps):
        before = thresholds.copy()
        present = [np.broadcast_to(weights, net[0].shape)]  # weight of the images that reach exit k
        for k in range(last - 1):
            gone = leaves(confidences[k], thresholds[:, k:k + 1])
            present.append(np.where(gone, ABSENT_WEIGHT * weights, present[-1]))
        ahead = net[last]  # what an image is worth if it goes on after exit k
        for k in range(last - 1, -1, -1):
            np.cumsum(((net[k] - ahead) * present[k])[:, scores.order[k]], 1, out=gain[:, 1:])
            thresholds[:, k] = cuts[k][gain.argmax(1)]
            ahead = np.where(leaves(confidences[k], thresholds[:, k:k + 1]), net[k], ahead)
        if np.array_equal(before, thresholds):
            break
    return thresholds


def _best_of_starts(scores: Scores, weights: np.ndarray, starts: np.ndarray) -> np.ndarray:
    price = prices()[:, None]
    paths, objectives = [], []
    for start in starts:
        paths.append(descend(scores, weights, np.tile(start, (len(price), 1))))
        exit_index = scores.exits(paths[-1])
        objectives.append((scores.values_at(exit_index) - price * scores.costs[exit_index]) @ weights)
    return np.stack(paths)[np.argmax(objectives, 0), np.arange(len(price))]


def search_path(scores: Scores, seed: int = 0) -> np.ndarray:
    """Ranks of thresholds by rising cost, the mean over random reweightings; float64 (prices, num_exits - 1)."""
    low, high = scores.costs[0], scores.costs[-1]
    starts = solve_geometric(scores, [low + share * (high - low) for share in (0.15, 0.6)])
    quantiles = Quantiles(scores.confidences)
    generator = np.random.default_rng(seed)
    total = np.zeros(())
    for _ in range(REWEIGHTINGS):  # the Bayesian bootstrap (Rubin 1981): no image is left out, none drawn twice
        weights = generator.standard_exponential(scores.num_images, np.float32)
        total = total + quantiles.ranks(_best_of_starts(scores, weights, starts))
    return _rising(total / REWEIGHTINGS)


def _rising(ranks: np.ndarray) -> np.ndarray:
    """Spending more never means leaving sooner: halfway between the tightest rising paths above and below."""
    above = np.maximum.accumulate(ranks)
    below = np.minimum.accumulate(ranks[::-1])[::-1]
    return (above + below) / 2


def _cost_grid(scores: Scores) -> np.ndarray:
    """Average costs between the cheapest exit and the full cost, float64 (GRID,)."""
    return np.linspace(scores.costs[0], scores.costs[-1], GRID + 2)[1:-1]


def _two_paths(scores: Scores, seed: int) -> Tuple[np.ndarray, np.ndarray]:
    """The geometric rule's path of ranks and the searched one, on one grid of costs."""
    grid = _cost_grid(scores)
    quantiles = Quantiles(scores.confidences)
    found = quantiles.ranks(thresholds_at(scores, search_path(scores, seed), grid, quantiles))
    rule = solve_geometric(scores, grid)
    # The rule's threshold says nothing at an exit where almost no image leaves.
    exit_index = scores.exits(rule)
    shares = np.stack([(exit_index == k).mean(1) for k in range(len(scores.costs) - 1)], 1)
    return np.where(shares < RARE_SHARE, found, quantiles.ranks(rule)), found


def _window_mean(rows: np.ndarray) -> np.ndarray:
    """Mean over WINDOW neighbours in the last dimension (fewer at the ends), which has GRID entries."""
    return rows @ (_NEAR / _NEAR.sum(0))


def choose_mixtures(scores: Scores, seed: int = 0) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cross-validation: the paths of each mixture are solved without a fold and tried on it.

    The further from the rule, the more answers change and the less certain the gain. So each budget takes the mixture
    whose gain minus two standard errors is largest, both over a window of neighbouring budgets, which share most
    images. If that is the rule itself everywhere, the first step away from it is taken where it gains a standard error.

    Returns:
        How far to move from the rule at each budget of the grid, float64 (GRID,), and each mixture's gain over the
        first, the geometric rule, in value, with its standard error, both float64 (len(MIXTURES), GRID).
    """
    order = np.random.default_rng(seed).permutation(scores.num_images)
    costs, values = np.zeros((2, len(MIXTURES), GRID))
    differences: List[List[np.ndarray]] = [[] for _ in MIXTURES]
    grid = _cost_grid(scores)
    for fold in np.array_split(order, FOLDS):
        inside, outside = scores.subset(np.setdiff1d(order, fold)), scores.subset(fold)
        rule, found = _two_paths(inside, seed)
        each = []  # value of each image at each budget
        for i, mixture in enumerate(MIXTURES):
            thresholds = thresholds_at(inside, lerp(rule, found, mixture), grid)
            exit_index = outside.exits(thresholds)
            each.append(outside.values_at(exit_index).astype(np.float64))
            costs[i] += outside.costs[exit_index].sum(1) / scores.num_images
            values[i] += each[i].sum(1) / scores.num_images
            differences[i].append(_window_mean((each[i] - each[0]).T))
    gains = _window_mean(np.stack([v - interpolate(costs[0], values[0], c) for c, v in zip(costs, values)]))
    errors = np.stack([np.concatenate(d).std(0, ddof=1) for d in differences]) / scores.num_images ** 0.5
    best = (gains - STANDARD_ERRORS * errors).argmax(0)
    if not best.any():
        best = (gains[1] > errors[1].clip(min=1e-9)).astype(np.int64)
    chosen = np.asarray(MIXTURES)[best]
    return _window_mean(chosen), gains, errors  # no jump between neighbours


def solve_search(
        scores: Scores,
        values: np.ndarray,
        budgets: Sequence[float],
        seed: int = 0,
) -> np.ndarray:
    """Thresholds for each average cost.

    Args:
        scores: Of the validation images.
        values: Of their answers, see `mixture_values`.
        budgets: Average costs as shares of the full cost.
        seed: Of the folds and reweightings.

    Returns:
        float32 (len(budgets), num_exits - 1).
    """
    scores = dataclasses.replace(scores, values=values)
    mixtures, _, _ = choose_mixtures(scores, seed)
    rule, found = _two_paths(scores, seed)
    path = lerp(rule, found, mixtures[:, None])
    if mixtures.any():
        path = _rising(path)
    return thresholds_at(scores, path, budgets)
