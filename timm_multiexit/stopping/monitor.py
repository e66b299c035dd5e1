"""What happens in the field: exit shares and average cost since start, against those of the held-out images.

Early exit fails quietly. Images that changed since calibration, or that were made to be slow, leave later and cost
more; others leave early and wrong. Both move the exit shares, which can be watched without labels.
"""
import math
from typing import Any, Optional, Union

import numpy as np

from ..errors import InputError
from .config import ExitConfig
from .costs import format_macs, parse_macs
from .policy import ALWAYS, CALIBRATE_HINT, NEVER, ExitPolicy

# Chance of a false alarm at each look. Looks are taken at FIRST_LOOK images and whenever their number has doubled: 20
# of them for 50 million images, so that all together are wrong once in 500 times.
ALPHA = 1e-4
FIRST_LOOK = 100
MIN_EXPECTED = 5.


class ExitMonitor:
    """Counts where images leave, warns if they leave elsewhere than calibration expects, and can cap the average cost.

    The test is Pearson's chi-square of two samples, the images so far and the held-out ones, so that few held-out
    images give no false alarm. It assumes that images come independently of one another: frames of one video do not.

    Args:
        config: That of the weights, with the scores of held-out images.
        policy: Thresholds that the images run under.
        max_average: MACs per image, like 30e6 or '30M', that the average since start shall not exceed: `policy` is then
            the most expensive of the config's path that keeps it, and the one given where that does. A batch can
            carry the average over it; the next ones make up for that. None for no limit.

    Attributes:
        counts: Images that left at each exit, int64 (num_exits,).
        warning: In words, or None; that of the latest look.

    Raises:
        InputError: no scores are stored, those of another measure of confidence, or a limit that no policy can keep.
    """

    def __init__(self, config: ExitConfig, policy: ExitPolicy, max_average: Optional[Union[str, float]] = None):
        if config.scores is None:
            raise InputError(f'no scores are stored with these weights: {CALIBRATE_HINT}')
        if policy.measure != config.measure and any(ALWAYS < t < NEVER for t in policy.thresholds):
            raise InputError(f'thresholds on {policy.measure} cannot be compared with the stored scores of '
                             f'{config.measure}: give a budget')
        self.limit = math.inf if max_average is None else parse_macs(max_average)
        if self.limit < config.exit_macs[0]:
            raise InputError(f'a limit of {format_macs(self.limit)} MACs on average cannot be kept: the first exit '
                             f'costs {format_macs(config.exit_macs[0])}')
        self._macs = np.asarray(config.exit_macs, np.float64)
        self._held_out = config.scores.development
        policies = [policy] if max_average is None else [policy, *config.path()]
        exits = [self._held_out.exits(p.thresholds) for p in policies]
        shares = [np.bincount(e, minlength=config.num_exits) / len(e) for e in exits]
        costs = [float(self._macs @ s) for s in shares]
        # Policies from the one given downwards, with shares and cost on the held-out images.
        self._rungs = [rung for rung in zip(policies, shares, costs) if rung[0] is policy or rung[2] < costs[0]]
        self._rung = 0
        self.counts = np.zeros(config.num_exits, np.int64)
        self._expected = np.zeros(config.num_exits)
        self._next_look = FIRST_LOOK
        self.warning: Optional[str] = None

    @property
    def policy(self) -> ExitPolicy:
        """To run the next images under."""
        return self._rungs[self._rung][0]

    @property
    def images(self) -> int:
        return int(self.counts.sum())

    @property
    def average_macs(self) -> float:
        """Of an image so far; NaN before the first."""
        return float(self._macs @ self.counts) / self.images if self.images else math.nan

    @property
    def expected_macs(self) -> float:
        """What calibration expects of as many images under the same policies."""
        return float(self._macs @ self._expected) / self.images if self.images else math.nan

    def update(self, exit_index: Any) -> None:
        """Counts images that ran under `policy`, and moves that if there is a limit.

        Args:
            exit_index: Exit of each image, ints (N,).
        """
        exit_index = np.asarray(exit_index)
        self.counts += np.bincount(exit_index, minlength=len(self.counts))
        self._expected += len(exit_index) * self._rungs[self._rung][1]
        if self.images >= self._next_look:
            self._next_look = 2 * self.images
            self.warning = self._look()
        if len(self._rungs) > 1:
            # As far below the limit as the average is above it, in what calibration expects where these images cost so
            # much more or less than expected.
            affordable = (2 * self.limit - self.average_macs) * self.expected_macs / self.average_macs
            within = (i for i, (_, _, cost) in enumerate(self._rungs) if cost <= affordable)
            self._rung = next(within, len(self._rungs) - 1)

    def p_value(self) -> float:
        """How likely shares at least this far from the expected ones are by chance."""
        ours, theirs = self.images, self._held_out.num_images
        pooled = (self.counts + self._expected / ours * theirs) / (ours + theirs)
        # Neighbours that few images leave at count as one exit: the test is an approximation for 5 or more.
        starts = [0]
        for k in range(1, len(pooled)):
            if min(pooled[starts[-1]:k].sum(), pooled[k:].sum()) * min(ours, theirs) >= MIN_EXPECTED:
                starts.append(k)
        apart, pooled = (np.add.reduceat(x, starts) for x in ((self.counts - self._expected) / ours, pooled))
        return chi_square_tail(float((apart ** 2 / pooled).sum()) / (1 / ours + 1 / theirs), len(starts) - 1)

    def _look(self) -> Optional[str]:
        chance = self.p_value()
        if chance >= ALPHA:
            return None
        return f'{self}; by chance that has probability {chance:.0e}: if the images changed, calibrate on new ones'

    def __str__(self) -> str:
        shares, expected = (' '.join(f'{100 * n / max(self.images, 1):.0f}' for n in numbers)
                            for numbers in (self.counts, self._expected))
        return (f'{self.images:,} images left at exits 1 to {len(self.counts)}: {shares} %, expected {expected} %; '
                f'{format_macs(self.average_macs)} MACs on average, expected {format_macs(self.expected_macs)}')


def chi_square_tail(statistic: float, degrees: int) -> float:
    """P(chi-square >= statistic), exact; devices have no SciPy.

    >>> round(chi_square_tail(11.07, 5), 3)
    0.05
    """
    if degrees < 1 or statistic <= 0.:
        return 1.
    half = statistic / 2
    start = degrees % 2 / 2  # terms half**i / gamma(i + 1) for i = 0, 1, ... or 1/2, 3/2, ...
    tail = math.erfc(math.sqrt(half)) if start else 0.
    return tail + sum(math.exp((start + i) * math.log(half) - half - math.lgamma(start + i + 1))
                      for i in range(degrees // 2))
