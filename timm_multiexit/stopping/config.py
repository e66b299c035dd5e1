"""The exit config, stored with weights: costs, temperatures and policies for a range of average budgets.

With it a user needs a budget and no data. The file is `weights/ARCH.TAG/multiexit.json` in the package and
`multiexit.json` beside a user's checkpoint and on the Hub. This module alone knows its schema, which
.github/FORMAT.md documents.
"""
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Tuple, Union

from ..errors import InputError
from ..files import read_json, write_json
from .costs import format_macs
from .policy import CALIBRATE_HINT, NEVER, ExitPolicy, check_average_budget, check_exits

VERSION = 1
FILE_NAME = 'multiexit.json'
RECIPE_NAME = 'recipe.yaml'


@dataclass(frozen=True)
class ExitConfig:
    """Exit costs and policies of one set of weights.

    Attributes:
        exit_macs: Cumulative MACs of each exit for one image.
        exit_params: Cumulative parameters of each exit.
        input_size: (C, H, W) of the image for which the costs hold.
        temperatures: One per exit, fitted on validation logits.
        policies: Of one method, by rising budget from the cheapest exit to the full cost.
        class_names: In the order of the logits, or None.
        fast_policies: Of the method 'fast': slightly less accurate and faster at equal cost. May be empty.
        version: Of the schema.

    Raises:
        InputError: values that do not fit together.
    """

    exit_macs: Tuple[int, ...]
    exit_params: Tuple[int, ...]
    input_size: Tuple[int, int, int]
    temperatures: Tuple[float, ...]
    policies: Tuple[ExitPolicy, ...]
    class_names: Optional[Tuple[str, ...]] = None
    fast_policies: Tuple[ExitPolicy, ...] = ()
    version: int = VERSION

    def __post_init__(self):
        for name in ('exit_macs', 'exit_params', 'input_size', 'temperatures', 'policies', 'class_names',
                     'fast_policies'):
            value = getattr(self, name)
            if value is not None:  # lists too: JSON has no tuples
                if not isinstance(value, Sequence) or isinstance(value, str):
                    raise InputError(f'exit config with {name} {value!r}: give a list')
                object.__setattr__(self, name, tuple(value))
        _check_version(self.version)
        count = len(self.exit_macs)
        if count == 0 or len(self.exit_params) != count or len(self.temperatures) != count:
            raise InputError(
                f'exit config with {count} costs, {len(self.exit_params)} parameter counts and '
                f'{len(self.temperatures)} temperatures: give one per exit')
        if not all(a < b for a, b in zip(self.exit_macs, self.exit_macs[1:])) or not self.exit_macs[0] > 0:
            raise InputError(f'exit config with costs {self.exit_macs}: they must rise from exit to exit')
        for family in (self.policies, self.fast_policies):
            budgets = []
            for policy in family:
                check_exits(policy, count)
                budgets.append(policy.budget)
            if None in budgets or any(a >= b for a, b in zip(budgets, budgets[1:])):
                raise InputError('exit config with policies out of order: give each its budget, by rising budget')

    @property
    def num_exits(self) -> int:
        return len(self.exit_macs)

    def check_network(self, model) -> None:
        """Checks that this config is of a network with these exits and classes.

        Raises:
            InputError: another number of exits or of classes.
        """
        if model.num_exits != self.num_exits:
            raise InputError(
                f'an exit config for {self.num_exits} exits does not fit a network with {model.num_exits}: '
                f'{CALIBRATE_HINT}')
        if self.class_names is not None and len(self.class_names) != model.num_classes:
            raise InputError(
                f'an exit config for {len(self.class_names)} classes does not fit a network with {model.num_classes}: '
                f'{CALIBRATE_HINT}')

    def policy_for(self, average_budget: float, fast: bool = False) -> ExitPolicy:
        """The policy for an average budget; between two stored budgets, thresholds are interpolated.

        Neighbours differ little, so their cost and accuracy on the validation images are interpolated too.

        Args:
            average_budget: Average MACs per image.
            fast: Choose the policy that uses few exits, which is faster at equal cost and slightly less accurate.

        Raises:
            InputError: no policies are stored, the budget is below the cheapest exit or above the full cost, or the
                stored policies do not cover it.
        """
        policies = self.fast_policies if fast else self.policies
        if not policies:
            raise InputError(f"no {'fast ' * fast}policies are stored with these weights: {CALIBRATE_HINT}")
        budget = check_average_budget(average_budget, self.exit_macs)
        budgets = [p.budget for p in policies if p.budget is not None]  # all have one
        upper = next((i for i, b in enumerate(budgets) if b >= budget), None)
        if upper is None or budget < budgets[0]:
            raise InputError(
                f'policies are stored for average budgets from {format_macs(budgets[0])} to '
                f'{format_macs(budgets[-1])}, not for {format_macs(budget)}: choose one between, or {CALIBRATE_HINT}')
        if budget == budgets[upper]:
            return policies[upper]
        weight = (budget - budgets[upper - 1]) / (budgets[upper] - budgets[upper - 1])
        return _interpolate(policies[upper - 1], policies[upper], weight, budget)

    def to_dict(self) -> Dict[str, Any]:
        """Plain values for JSON; what all policies share (temperatures, measure, method) is written once."""
        policies, fast = ([p.to_dict() for p in family] for family in (self.policies, self.fast_policies))
        shared = {}
        for name, family in (('measure', policies + fast), ('method', policies), ('method', fast)):
            values = {p.pop(name, '') for p in family}
            if len(values) > 1:
                raise InputError(
                    f'exit config with policies of more than one {name}, {sorted(values)}: store those of one')
            shared.setdefault(name, next(iter(values), ''))
        for p in policies + fast:
            if tuple(p.pop('temperatures')) != tuple(self.temperatures):
                raise InputError('exit config with policies of other temperatures: store those of one calibration')
        return dict(
            version=self.version,
            exit_macs=list(self.exit_macs),
            exit_params=list(self.exit_params),
            input_size=list(self.input_size),
            temperatures=list(self.temperatures),
            class_names=None if self.class_names is None else list(self.class_names),
            **shared,
            policies=policies,
            fast_policies=fast)

    @classmethod
    def from_dict(cls, values: Dict[str, Any]) -> 'ExitConfig':
        """The config of `to_dict`.

        Raises:
            InputError: not an exit config, or of another version.
        """
        if not isinstance(values, dict):
            raise InputError(f'not an exit config but {type(values).__name__}: {CALIBRATE_HINT}')
        values = dict(values)
        _check_version(values.get('version'))
        shared = {k: v for k, v in ((k, values.pop(k, '')) for k in ('measure', 'method')) if v}
        known = {f.name for f in dataclasses.fields(cls)}
        missing = known - {'class_names', 'fast_policies'} - values.keys()
        if missing or values.keys() - known:
            raise InputError(
                f"exit config without {', '.join(sorted(missing)) or 'gaps'} and with unknown "
                f"{', '.join(sorted(values.keys() - known)) or 'nothing'}: {CALIBRATE_HINT}")
        shared['temperatures'] = values['temperatures']
        for name, method in (('policies', {}), ('fast_policies', {'method': 'fast'})):
            policies = values.pop(name, [])
            if not isinstance(policies, (list, tuple)) or not all(isinstance(p, dict) for p in policies):
                raise InputError(f'exit config whose {name} are not a list of policies: {CALIBRATE_HINT}')
            values[name] = tuple(ExitPolicy.from_dict({**shared, **method, **p}) for p in policies)
        return cls(**values)

    def save(self, path: Union[str, Path]) -> None:
        """Writes JSON."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: Union[str, Path]) -> 'ExitConfig':
        """Reads what `save` wrote.

        Raises:
            InputError: no such file, or no exit config in it.
        """
        return cls.from_dict(read_json(path, 'exit config'))


def _check_version(version: Any) -> None:
    if version != VERSION:
        raise InputError(
            f'exit config of version {version}, this package reads version {VERSION}: update timm-multiexit')


def _interpolate(low: ExitPolicy, high: ExitPolicy, weight: float, budget: float) -> ExitPolicy:
    def between(a, b):
        return None if a is None or b is None else a + weight * (b - a)

    def row(a, b):
        return None if a is None or b is None else tuple(between(x, y) for x, y in zip(a, b))

    def threshold(a, b):
        if min(a, b) > 1.:
            return NEVER
        return between(min(a, 1.), min(b, 1.))  # up to 1, the largest confidence

    return dataclasses.replace(
        high,
        thresholds=tuple(threshold(a, b) for a, b in zip(low.thresholds, high.thresholds)),
        budget=budget,
        expected_macs=between(low.expected_macs, high.expected_macs),
        expected_accuracy=between(low.expected_accuracy, high.expected_accuracy),
        exit_shares=row(low.exit_shares, high.exit_shares))
