"""A search for the thresholds themselves: best validation accuracy within an average cost, guarded against overfitting.

For a price of computation, thresholds that maximise mean(value - price * cost) are found by coordinate descent: with
the other exits' thresholds fixed, the best threshold of one exit is the largest prefix sum over the images sorted by
confidence. Prices from high through zero to negative give a path from the cheapest exit to the full cost. Three things
keep a few thousand images from being learned by heart:

* The value of an answer is mostly the probability that a calibrated mixture of all exits gives it, and only partly
  whether it is right, which is one noisy bit.
* The path is the mean of several, each on a random reweighting of the images, and its thresholds rise with the cost.
* How far to go from the geometric rule's thresholds towards it is chosen by cross-validation, for each part of the
  budgets by itself, and no farther than is sure to pay there.
"""
import dataclasses
from typing import List, Sequence, Tuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from .geometric import solve_geometric
from .policy import NEVER
from .scores import Quantiles, Scores, thresholds_at

LABEL_WEIGHT = 0.3  # of the labels in an answer's value
REWEIGHTINGS = 6
FOLDS = 5
MIXTURES = (0., 0.25, 0.5, 0.75, 1.)  # 0 is the geometric rule
WINDOW = 7  # of the grid's budgets, over which gains are averaged
STANDARD_ERRORS = 2.  # that a gain must be away from 0 to be believed
# Images that have left earlier count this little at an exit: enough to set a threshold that no image reaches.
ABSENT_WEIGHT = 0.02
RARE_SHARE = 0.005
GRID = 40


def mixture_values(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Value of each exit's answer: mixture probability, blended with whether it is right.

    The mixture is softmax(sum_k w_k logits_k) with one fitted weight per exit.

    Args:
        logits: (num_exits, N, num_classes).
        targets: int64 (N,).

    Returns:
        float32 (num_exits, N).
    """
    weights = torch.full((len(logits),), 1. / len(logits), requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=30, line_search_fn='strong_wolfe')

    def loss():
        optimizer.zero_grad()
        # The penalty only keeps the weights of near-equal exits from growing with opposite signs.
        value = F.cross_entropy(torch.tensordot(weights, logits, 1), targets) + 1e-3 * weights.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    mixture = torch.tensordot(weights.detach(), logits, 1).softmax(1)
    answers = logits.argmax(2)
    soft = mixture.gather(1, answers.T).T
    return torch.lerp(soft, (answers == targets).float(), LABEL_WEIGHT)


def prices() -> torch.Tensor:
    """Prices of the full cost in units of accuracy, from high to low; below zero, computation is rewarded."""
    positive = torch.logspace(0.5, -4, 32)
    return torch.cat([positive, torch.zeros(1), -positive.flip(0)])


def descend(scores: Scores, weights: torch.Tensor, start: torch.Tensor, sweeps: int = 8) -> torch.Tensor:
    """Coordinate descent for all prices at once.

    Args:
        scores: Of the validation images.
        weights: Of the images, float32 (N,).
        start: Thresholds float32 (P, num_exits - 1), one row per price.
        sweeps: At most so many times over all exits.

    Returns:
        Thresholds like `start`.
    """
    confidences, costs = scores.confidences, scores.costs.float()
    last, images = len(costs) - 1, scores.num_images
    price = prices().unsqueeze(1)
    orders = confidences[:-1].argsort(1, descending=True)
    rows = confidences[:-1].gather(1, orders)
    # cuts[k][i] lets the i most confident images leave.
    cuts = torch.cat([torch.full((last, 1), NEVER), (rows[:, 1:] + rows[:, :-1]) / 2, torch.zeros(last, 1)], 1)
    net = [scores.values[k] - price * costs[k] for k in range(last + 1)]
    thresholds = start.clone()
    for _ in range(sweeps):
        before = thresholds.clone()
        present = [weights.expand(len(price), images)]  # weight of the images that reach exit k
        for k in range(last - 1):
            here = confidences[k] < thresholds[:, k:k + 1]
            present.append(torch.where(here, present[-1], ABSENT_WEIGHT * weights))
        ahead = net[last]  # what an image is worth if it goes on behind exit k
        for k in range(last - 1, -1, -1):
            gain = ((net[k] - ahead) * present[k])[:, orders[k]].cumsum(1)
            thresholds[:, k] = cuts[k][F.pad(gain, (1, 0)).argmax(1)]
            ahead = torch.where(confidences[k] >= thresholds[:, k:k + 1], net[k], ahead)
        if torch.equal(before, thresholds):
            break
    return thresholds


def _best_of_starts(scores: Scores, weights: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    price = prices().unsqueeze(1)
    best, best_value = None, None
    for start in starts:
        found = descend(scores, weights, start.expand(len(price), -1))
        exit_index = scores.exits(found)
        value = (weights * (scores.values.gather(0, exit_index) - price * scores.costs.float()[exit_index])).sum(1)
        if best is None:
            best, best_value = found, value
        better = value > best_value
        best, best_value = torch.where(better.unsqueeze(1), found, best), torch.maximum(value, best_value)
    return best


def search_path(scores: Scores, seed: int = 0) -> torch.Tensor:
    """Ranks of thresholds by rising cost, the mean over random reweightings; float64 (prices, num_exits - 1)."""
    low, high = float(scores.costs[0]), float(scores.costs[-1])
    starts = solve_geometric(scores, [low + share * (high - low) for share in (0.15, 0.6)])
    quantiles = Quantiles(scores.confidences)
    generator = torch.Generator().manual_seed(seed)
    total = 0.
    for _ in range(REWEIGHTINGS):  # the Bayesian bootstrap (Rubin 1981): no image is left out, none comes twice
        weights = torch.empty(scores.num_images).exponential_(generator=generator)
        total = total + quantiles.ranks(_best_of_starts(scores, weights, starts))
    return _rising(total / REWEIGHTINGS)


def _rising(ranks: torch.Tensor) -> torch.Tensor:
    """More to spend never means to leave sooner: halfway between the lowest rising path above and the highest below."""
    return (ranks.cummax(0).values + ranks.flip(0).cummin(0).values.flip(0)) / 2


def _two_paths(scores: Scores, seed: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """The geometric rule's path of ranks and the searched one, on one grid of costs."""
    low, high = float(scores.costs[0]), float(scores.costs[-1])
    grid = torch.linspace(low, high, GRID + 2)[1:-1].tolist()
    quantiles = Quantiles(scores.confidences)
    found = quantiles.ranks(thresholds_at(scores, search_path(scores, seed), grid, quantiles))
    rule = solve_geometric(scores, grid)
    # The rule's threshold of an exit where next to no image leaves says nothing.
    exit_index = scores.exits(rule)
    shares = torch.stack([(exit_index == k).double().mean(1) for k in range(len(scores.costs) - 1)], 1)
    return torch.where(shares < RARE_SHARE, found, quantiles.ranks(rule)), found


def _window_mean(rows: torch.Tensor) -> torch.Tensor:
    """Mean over WINDOW neighbours in the last dimension (fewer at the ends) of float64 (M, GRID)."""
    return F.avg_pool1d(rows.unsqueeze(1), WINDOW, 1, WINDOW // 2, count_include_pad=False).squeeze(1)


def choose_mixtures(scores: Scores, seed: int = 0) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross-validation: each mixture's paths are made without a fold and tried on it.

    The farther from the rule, the more answers change and the less sure is the gain. So at each budget the mixture is
    taken whose gain less two standard errors is largest, both over a window of neighbouring budgets, which share most
    images. If that is the rule itself everywhere, the first step away from it is taken where it gains a standard error.

    Returns:
        How far to go from the rule at each budget of the grid, float64 (GRID,), and each mixture's gain over the first,
        the geometric rule, in value, with its standard error, both float64 (len(MIXTURES), GRID).
    """
    order = torch.randperm(scores.num_images, generator=torch.Generator().manual_seed(seed))
    costs = torch.zeros(len(MIXTURES), GRID, dtype=torch.float64)
    values = torch.zeros_like(costs)
    differences: List[List[torch.Tensor]] = [[] for _ in MIXTURES]
    low, high = float(scores.costs[0]), float(scores.costs[-1])
    budgets = torch.linspace(low, high, GRID + 2)[1:-1].tolist()
    for fold in tqdm(order.chunk(FOLDS), desc='thresholds', unit='fold', leave=False, disable=None):
        rest = torch.ones(scores.num_images, dtype=torch.bool)
        rest[fold] = False
        inside, outside = scores.subset(rest), scores.subset(fold)
        rule, found = _two_paths(inside, seed)
        each = []  # value of each image at each budget
        for i, mixture in enumerate(MIXTURES):
            thresholds = thresholds_at(inside, torch.lerp(rule, found, mixture), budgets)
            each.append(outside.values.gather(0, outside.exits(thresholds)).double())
            costs[i] += outside.average_costs(thresholds) * len(fold) / scores.num_images
            values[i] += each[i].mean(1) * len(fold) / scores.num_images
            differences[i].append(_window_mean((each[i] - each[0]).T))
    gains = _window_mean(torch.stack([v - interpolate(costs[0], values[0], c) for c, v in zip(costs, values)]))
    errors = torch.stack([torch.cat(d).std(0) for d in differences]) / scores.num_images ** 0.5
    best = (gains - STANDARD_ERRORS * errors).argmax(0)
    if not best.any():
        best = (gains[1] > errors[1].clamp(min=1e-9)).long()
    chosen = torch.tensor(MIXTURES, dtype=torch.float64)[best]
    return _window_mean(chosen.unsqueeze(0)).squeeze(0), gains, errors  # no jump between neighbours


def interpolate(x: torch.Tensor, y: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """y at some places of a curve of points (x, y), linearly between them and constant outside."""
    order = x.argsort()
    x, y = x[order].contiguous(), y[order]
    upper = torch.searchsorted(x, at.contiguous()).clamp(1, len(x) - 1)
    step = x[upper] - x[upper - 1]
    weight = ((at - x[upper - 1]) / torch.where(step > 0, step, 1.)).clamp(0., 1.)
    return torch.lerp(y[upper - 1], y[upper], weight)


def solve_search(
        scores: Scores,
        values: torch.Tensor,
        budgets: Sequence[float],
        seed: int = 0,
) -> torch.Tensor:
    """Thresholds for each average cost.

    Args:
        scores: Of the validation images.
        values: Of their answers, see `mixture_values`.
        budgets: Wanted average costs as shares of the full cost.
        seed: Of the folds and reweightings.

    Returns:
        float32 (len(budgets), num_exits - 1).
    """
    scores = dataclasses.replace(scores, values=values)
    mixtures, _, _ = choose_mixtures(scores, seed)
    rule, found = _two_paths(scores, seed)
    path = torch.lerp(rule, found, mixtures.unsqueeze(1))
    if mixtures.any():
        path = _rising(path)
    return thresholds_at(scores, path, budgets)
