"""The time of a policy on this machine, under the traffic that calibration expects.

Times of stages and heads do not add up to it: what one run leaves in the processor's cache decides how long the next
one takes. Of msfuse_cifar by onnxruntime, the first exit takes 0.7 ms where all images leave there, and 1.2 ms between
runs of the whole network; in batches, the images that go on are gathered, and are fewer. So what is solved from a
profile is tried, and asked for again, see `ExitConfig.policy_for`.
"""
import statistics
import threading
import time
from typing import Any, Callable, Optional

import numpy as np

from ..stopping.policy import Decision, ExitPolicy, StoppingRule

_SECONDS = 1.  # to spend, about
_ROUNDS = 3, 9  # at least and at most; a machine's speed drifts, and the first image of a round is slow
_IMAGES = 270  # in all rounds, unless they take too long


class ExpectedTraffic:
    """A `StoppingRule` that does a policy's work, while images leave by turns, in the shares that are expected.

    Args:
        policy: With its `exit_shares`.
        images: After so many the turns repeat.
    """

    def __init__(self, policy: ExitPolicy, images: int = _IMAGES):
        assert policy.exit_shares is not None  # the solver sets them
        counts = np.diff(np.round(np.cumsum(policy.exit_shares) * images).astype(int), prepend=0)
        self.turns = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
        self.policy, self.taken, self.repeated = policy, 0, self.turns
        self.lock = threading.Lock()
        self.num_exits, self.exits_in_use = policy.num_exits, policy.exits_in_use

    def decide(self, exit_index: int, logits: Any, memory: Optional[Any] = None) -> Decision:
        """See `StoppingRule`; the memory holds each image's exit."""
        if memory is None:
            with self.lock:
                start = self.taken % len(self.turns)
                self.taken += len(logits)
            if start + len(logits) > len(self.repeated):
                self.repeated = np.tile(self.turns, 1 + -(-(start + len(logits)) // len(self.turns)))
            memory = self.repeated[start:start + len(logits)]
        last = exit_index == self.exits_in_use[-1]
        return Decision(self.policy.decide(exit_index, logits).confidence, (memory <= exit_index) | last, memory)


def share_of_full_time(prepare: Callable[[StoppingRule], Callable[[], Any]], policy: ExitPolicy) -> float:
    """Time of a policy as a share of the full network's, the two measured in turns: median of the rounds.

    Args:
        prepare: Gives, for a rule, a function that runs an image, or a batch, under it.
        policy: With its `exit_shares`.
    """
    own = prepare(ExpectedTraffic(policy))
    whole = prepare(ExitPolicy.at_exit(policy.num_exits - 1, policy.num_exits))
    _seconds(own, 1)
    _seconds(whole, 1)
    once = _seconds(whole, 1)
    rounds = int(min(max(_SECONDS / once, _ROUNDS[0]), _ROUNDS[1]))
    passes = max(1, int(min(_SECONDS / once, _IMAGES) / rounds))
    few = -(-passes // 4)
    return statistics.median(_seconds(own, passes) / passes / (_seconds(whole, few) / few) for _ in range(rounds))


def _seconds(task: Callable[[], Any], passes: int) -> float:
    start = time.perf_counter()
    for _ in range(passes):
        task()
    return time.perf_counter() - start
