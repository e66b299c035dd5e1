"""The exit config, stored with weights: costs, temperatures, and the scores from which any policy is solved.

With it a user needs a budget and no data. Two files beside the weights: `multiexit.json` and `scores.safetensors`; by
another name, `NAME.json` and `NAME.scores.safetensors`. This module alone knows the schema of the first, `scores` that
of the second; .github/FORMAT.md documents both.
"""
import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np

from ..errors import InputError
from ..files import read_json, write_json
from .costs import ExitCosts, StageCosts, parse_latency, parse_macs
from .guarantee import certified, risk_losses, tightest
from .policy import CALIBRATE_HINT, MEASURES, ExitPolicy
from .scores import FILE_NAME as SCORES_NAME
from .scores import UNKNOWN, ExitScores, check_labelled_logits
from .solve import GRID_BUDGETS, Solver, budget_grid
from .temperature import fit_temperature

VERSION = 2
FILE_NAME = 'multiexit.json'
RECIPE_NAME = 'recipe.yaml'
# A policy for a time is measured up to this often, until the logarithms of both times differ by less than this.
_TRIALS, _CLOSE = 4, 0.04


@dataclass(frozen=True, eq=False)
class ExitConfig:
    """What the exits of one set of weights cost, and when to stop.

    Attributes:
        exit_macs: Cumulative MACs of each exit for one image.
        exit_params: Cumulative parameters of each exit.
        input_size: (C, H, W) of the image for which the costs hold.
        temperatures: One per exit, fitted on the development images.
        measure: Confidence measure of the scores, see `policy.scores`.
        class_names: In the order of the logits, or None.
        weights: Digest of the weights, or '' if it is not known.
        scores: Scores of the held-out images, or None if they are not stored.
        version: Version of the schema.

    Raises:
        InputError: values that do not fit together.
    """

    exit_macs: Tuple[int, ...]
    exit_params: Tuple[int, ...]
    input_size: Tuple[int, int, int]
    temperatures: Tuple[float, ...]
    measure: str = 'max_softmax'
    class_names: Optional[Tuple[str, ...]] = None
    weights: str = ''
    scores: Optional[ExitScores] = None
    version: int = VERSION
    _solved: Dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        for name in ('exit_macs', 'exit_params', 'input_size', 'temperatures', 'class_names'):
            value = getattr(self, name)
            if value is not None or name != 'class_names':  # lists too: JSON has no tuples
                if not isinstance(value, Sequence) or isinstance(value, str):
                    raise InputError(f'exit config with {name} {value!r}: give a list')
                if name != 'class_names' and not all(
                        isinstance(v, (int, float)) and math.isfinite(v) and v > 0 for v in value):
                    raise InputError(f'exit config with {name} {value!r}: give numbers above 0')
                object.__setattr__(self, name, tuple(value))
        if self.version != VERSION:
            raise InputError(f'exit config of version {self.version!r}, this package reads version {VERSION}: '
                             f'{CALIBRATE_HINT}')
        count = len(self.exit_macs)
        if count == 0 or len(self.exit_params) != count or len(self.temperatures) != count:
            raise InputError(
                f'exit config with {count} costs, {len(self.exit_params)} parameter counts and '
                f'{len(self.temperatures)} temperatures: give one per exit')
        if not all(a < b for a, b in zip(self.exit_macs, self.exit_macs[1:])):
            raise InputError(f'exit config with costs {self.exit_macs}: they must rise from exit to exit')
        if self.measure not in MEASURES:
            raise InputError(f"exit config of measure '{self.measure}': choose one of {', '.join(MEASURES)}")
        if self.scores is not None and len(self.scores.scores) != count:
            raise InputError(f'scores of {len(self.scores.scores)} exits beside costs of {count}: {CALIBRATE_HINT}')

    @classmethod
    def fit(
            cls,
            logits: Sequence[np.ndarray],
            targets: np.ndarray,
            costs: ExitCosts,
            class_names: Optional[Sequence[str]] = None,
            measure: str = 'max_softmax',
            certification: Optional[np.ndarray] = None,
            weights: str = '',
    ) -> 'ExitConfig':
        """The config of held-out images.

        Args:
            logits: One (N, num_classes) per exit, of images under the test transform on which the network was not
                trained; arrays or tensors.
            targets: Their labels, int64 (N,); -1 where unknown.
            costs: Costs of the exits.
            class_names: In the order of the logits.
            measure: See `policy.scores`.
            certification: Which images are kept for guarantees, bool (N,); None for none of them. Temperatures are
                fitted on the others that have labels; without any such, they are 1.
            weights: Digest of the network's weights.

        Raises:
            InputError: logits or labels that cannot be used, or no images besides those for certification.
        """
        stacked, targets = check_labelled_logits(logits, targets, unknown=True)
        if len(costs.macs) != len(stacked):
            raise InputError(f'{len(costs.macs)} costs for the logits of {len(stacked)} exits: give one cost per exit')
        held = np.zeros(len(targets), bool) if certification is None else np.asarray(certification, bool)
        if held.all():
            raise InputError('all images are kept for certification: leave some to set thresholds on')
        use = ~held & (targets != UNKNOWN)
        temperatures = tuple(
            round(fit_temperature(x[use], targets[use]), 4) if use.any() else 1. for x in stacked)
        return cls(
            costs.macs, costs.params, costs.input_size, temperatures, measure,
            None if class_names is None else tuple(class_names), weights,
            ExitScores.from_logits(stacked, targets, temperatures, measure, held))

    def __eq__(self, other: Any) -> bool:
        if not isinstance(other, ExitConfig) or self.to_dict() != other.to_dict():
            return False
        if self.scores is None or other.scores is None:
            return self.scores is other.scores
        return all(np.array_equal(getattr(self.scores, f.name), getattr(other.scores, f.name))
                   for f in dataclasses.fields(ExitScores))

    @property
    def num_exits(self) -> int:
        return len(self.exit_macs)

    def names_of(self, num_classes: int) -> Sequence[str]:
        """The class names, or 'class 0' and so on where they are not known."""
        return self.class_names or [f'class {k}' for k in range(num_classes)]

    @property
    def costs(self) -> ExitCosts:
        return ExitCosts(self.exit_macs, self.exit_params, self.input_size)

    def check_network(self, model, weights: str = '') -> None:
        """Checks that this config is of a network with these exits, classes and weights.

        Args:
            model: The network.
            weights: Digest of its weights; '' not to check it.

        Raises:
            InputError: another number of exits or of classes, or other weights.
        """
        if model.num_exits != self.num_exits:
            raise InputError(
                f'an exit config for {self.num_exits} exits does not fit a network with {model.num_exits}: '
                f'{CALIBRATE_HINT}')
        if self.class_names is not None and len(self.class_names) != model.num_classes:
            raise InputError(
                f'an exit config for {len(self.class_names)} classes does not fit a network with {model.num_classes}: '
                f'{CALIBRATE_HINT}')
        if weights and self.weights and weights != self.weights:
            raise InputError(f'the exit config is of other weights than these: {CALIBRATE_HINT}')

    def policy_for(
            self,
            average_budget: Optional[Union[str, float]] = None,
            *,
            average_ms: Optional[Union[str, float]] = None,
            max_loss: Optional[float] = None,
            certainty: float = 0.95,
            risk: str = 'accuracy',
            profile: Optional[StageCosts] = None,
    ) -> ExitPolicy:
        """The policy that is worth most at an average cost, or the least expensive with a bounded loss.

        It is solved on the development images (0.1 s for 7 exits) and kept. Give one of the first three.

        Args:
            average_budget: Average MACs per image, like 25e6 or '25M'. Where the images cannot be split to meet it, the
                next cheaper policy.
            average_ms: Average milliseconds per image, like 2 or '2ms', or a share of the full network's, like '50%';
                with the `profile` of this machine; within 10 %, if the profile can measure.
            max_loss: Loss of accuracy against the full network, in points (0.5 is half a percent), on new images of the
                same distribution (exchangeable with the certification images), with probability `certainty` over the
                draw of those. See `guarantee`.
            certainty: Probability with which `max_loss` holds.
            risk: What `max_loss` bounds: 'accuracy', 'harm' or 'consistency', see `guarantee.risk_losses`.
            profile: Milliseconds of stages and heads, see `inference.profile`; with `max_loss`, the least time is
                sought in place of the fewest MACs.

        Raises:
            InputError: no scores are stored, the budget is below the cheapest exit or above the full cost, or the
                promise cannot be made.
        """
        if sum(x is not None for x in (average_budget, average_ms, max_loss)) != 1:
            raise InputError('give one of average_budget, average_ms and max_loss')
        if average_ms is not None and profile is None:
            raise InputError('milliseconds depend on the machine: pass its profile with average_ms')
        costs = StageCosts.of_macs(self.exit_macs) if profile is None or average_budget is not None else profile
        if len(costs.stages) != self.num_exits:
            raise InputError(f'a profile of {len(costs.stages)} exits does not fit a network with {self.num_exits}')
        if isinstance(average_budget, str):
            average_budget = parse_macs(average_budget)
        if average_ms is not None:
            average_ms = parse_latency(average_ms, costs.full)
        key = (average_budget, average_ms, max_loss, certainty, risk, costs)
        if key not in self._solved:
            if max_loss is not None:
                self._solved[key] = self._promised(costs, max_loss, certainty, risk)
            elif average_ms is not None and costs.measure is not None:
                self._solved[key] = self._measured(costs, float(average_ms))
            else:
                solver = self._solver(costs)
                self._solved[key] = solver.policy(solver.best(average_budget or average_ms or 0.))
        return self._solved[key]

    def policies(self, count: int = GRID_BUDGETS) -> Dict[float, ExitPolicy]:
        """Policies for so many average budgets, in MACs, from the cheapest exit to the full cost.

        Raises:
            InputError: no scores are stored.
        """
        return {budget: self.policy_for(budget)
                for budget in budget_grid(self.exit_macs[0], self.exit_macs[-1], count)}

    def _measured(self, costs: StageCosts, target: float) -> ExitPolicy:
        """The policy whose measured time is nearest to `target`, within the 10 % that a measurement may be off.

        What is solved from times of stages and heads is tried, and asked for again by as much as it was off.
        """
        assert costs.measure is not None
        solver = self._solver(costs)
        if target > costs.full:
            solver.checked(target)
        tried: Dict[float, Tuple[float, ExitPolicy]] = {}  # milliseconds and policy of what was asked for
        ask = target
        while len(tried) < _TRIALS:
            ask = min(max(ask, costs.cheapest), costs.full)
            if ask in tried:
                break
            policy = solver.policy(solver.best(ask))
            ms = costs.measure(policy)
            tried[ask] = ms, dataclasses.replace(policy, expected_ms=ms)
            if abs(math.log(ms / target)) < _CLOSE:
                break
            below = [(a, x) for a, (x, _) in sorted(tried.items()) if x <= target]
            above = [(a, x) for a, (x, _) in sorted(tried.items()) if x > target]
            if below and above:  # in between, in proportion
                (a, x), (b, y) = below[-1], above[0]
                ask = a + (b - a) * (target - x) / (y - x)
            else:
                ask *= (target / ms) ** 1.5  # a little further: time moves less than what was asked for
        ms, policy = min(tried.values(), key=lambda found: abs(math.log(found[0] / target)))
        if costs.cheapest in tried and ms > 1.1 * target:
            raise InputError(f'an average of {target:.3f} ms cannot be kept: the cheapest policy takes {ms:.3f} ms on '
                             'this machine')
        return policy

    def path(self, profile: Optional[StageCosts] = None) -> List[ExitPolicy]:
        """Policies from the most to the least expensive, in MACs or in the profile's time, without the full network."""
        costs = profile or StageCosts.of_macs(self.exit_macs)
        key = ('path', costs)
        if key not in self._solved:
            self._solved[key] = self._solver(costs).path()
        return self._solved[key]

    def _solver(self, costs: StageCosts) -> Solver:
        if self.scores is None:
            raise InputError(f'no scores are stored with these weights: {CALIBRATE_HINT}')
        if ('solver', costs) not in self._solved:
            self._solved['solver', costs] = Solver(
                self.scores.development, costs, self.exit_macs, self.temperatures, self.measure)
        return self._solved['solver', costs]

    def _promised(self, costs: StageCosts, max_loss: float, certainty: float, risk: str) -> ExitPolicy:
        candidates = self.path(costs)
        assert self.scores is not None  # or there would be no path
        kept = self.scores.for_certification
        kept = kept.subset(np.random.default_rng(0).permutation(kept.num_images))  # the bound needs a random order
        if kept.num_images == 0:
            raise InputError('these weights carry no certification images, so no loss can be guaranteed: run '
                             'timm-multiexit calibrate MODEL --certify DIR --output FILE on your own images, then pass '
                             '--exit-config FILE (to export too)')
        labelled = kept.labels != UNKNOWN
        if risk != 'consistency' and not labelled.all():
            raise InputError(f'{int((~labelled).sum())} of {kept.num_images} certification images have no label: '
                             'choose --risk consistency')
        rows = np.arange(kept.num_images)
        answers = np.stack([kept.predictions[kept.exits(p.thresholds), rows] for p in candidates])
        losses = risk_losses(risk, answers, kept.predictions[-1], kept.labels)
        chosen = certified(losses, max_loss, certainty, risk)
        if chosen is None:
            raise InputError(
                f'a loss of at most {max_loss:g} points cannot be promised from {kept.num_images} certification images '
                f'with certainty {certainty:g}: ask for {tightest(losses[0], certainty, risk):.2f} points or more, '
                'lower --certainty, or certify more images')
        what = {'accuracy': 'points less accurate than the full network',
                'harm': '% of images wrong that the full network gets right',
                'consistency': '% of answers that differ from those of the full network'}[risk]
        return dataclasses.replace(
            candidates[chosen], promise=f'at most {max_loss:g} {what}, with certainty {certainty:g}, for images '
            f'like the {kept.num_images:,} certification images')

    def to_dict(self) -> Dict[str, Any]:
        """Plain values for JSON, without the scores."""
        return {f.name: list(v) if isinstance(v, tuple) else v
                for f in dataclasses.fields(self) if f.name not in ('scores', '_solved')
                for v in (getattr(self, f.name),)}

    @classmethod
    def from_dict(cls, values: Dict[str, Any], scores: Optional[ExitScores] = None) -> 'ExitConfig':
        """The config of `to_dict`.

        Raises:
            InputError: not an exit config, or of another version.
        """
        if not isinstance(values, dict):
            raise InputError(f'not an exit config but {type(values).__name__}: {CALIBRATE_HINT}')
        if values.get('version') != VERSION:
            raise InputError(f"exit config of version {values.get('version')!r}, this package reads version {VERSION}: "
                             f'{CALIBRATE_HINT}')
        known = {f.name for f in dataclasses.fields(cls)} - {'scores', '_solved'}
        if values.keys() != known:
            wrong = [f"{kind} {', '.join(sorted(map(str, names)))}" for kind, names in (
                ('without', known - values.keys()), ('with unknown', values.keys() - known)) if names]
            raise InputError(f"exit config {' and '.join(wrong)}: {CALIBRATE_HINT}")
        return cls(**values, scores=scores)

    def save(self, path: Union[str, Path]) -> None:
        """Writes JSON, and the scores beside it."""
        if self.scores is None:
            scores_path(path).unlink(missing_ok=True)
        else:
            self.scores.save(scores_path(path), self.weights, self.temperatures)
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: Union[str, Path]) -> 'ExitConfig':
        """Reads what `save` wrote.

        Raises:
            InputError: no such file, no exit config in it, or scores beside it that are damaged or of other weights.
        """
        place = scores_path(path)
        if not place.is_file():
            return cls.from_dict(read_json(path, 'exit config'))
        scores, made_of = ExitScores.load(place)
        config = cls.from_dict(read_json(path, 'exit config'), scores)
        if made_of.get('weights', '') != config.weights:
            raise InputError(f"the scores '{place}' are of other weights than '{path}': {CALIBRATE_HINT}")
        # A kill between the two files leaves one of each calibration. Scores of earlier versions do not name theirs.
        own = json.dumps(list(config.temperatures))
        if made_of.get('temperatures', own) != own:
            raise InputError(f"the scores '{place}' are of another calibration than '{path}': {CALIBRATE_HINT}")
        return config


def scores_path(path: Union[str, Path]) -> Path:
    """The file of the scores of an exit config: several may lie in one folder, each with its own."""
    path = Path(path)
    return path.with_name(SCORES_NAME if path.name == FILE_NAME else f'{path.stem}.{SCORES_NAME}')
