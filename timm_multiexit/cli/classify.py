"""`timm-multiexit classify IMAGE...`: the answer for each image, exit by exit, under a budget if one is given."""
import argparse
import json
import sys
from dataclasses import asdict, dataclass
from typing import Callable, Iterable, Iterator, List, Optional, Sequence, Tuple

import torch

from ..errors import InputError, MissingFileError
from ..inference.anytime import AnytimeRunner
from ..inference.batch_loop import segments_of
from ..inference.engine import ENGINES, Engine, make_engine
from ..inference.images import named_images
from ..inference.preprocess import Preprocessing
from ..inference.profile import profile
from ..models import MultiExitNet, exit_costs
from ..pretrained.names import class_labels
from ..stopping.config import ExitConfig
from ..stopping.costs import ExitCosts, StageCosts, format_macs, parse_latency, parse_macs, parse_milliseconds
from ..stopping.policy import ExitPolicy
from ._common import (
    add_budget_options,
    add_model_options,
    asks_for_policy,
    load_network,
    requested_policy,
    stored_exit_config,
)

# An exit that ran, its logits (1, num_classes), and why it is the last to run, or ''.
Step = Tuple[int, torch.Tensor, str]


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        'classify', help='classify images, exit by exit',
        description='Classifies images, exit by exit. Without a budget all exits run.')
    parser.add_argument('images', nargs='+', metavar='IMAGE',
                        help="files, folders (with their subfolders) or quoted patterns like '*.png'")
    parser.add_argument('--model', default='', help='name in the registry, hf-hub:... or local-dir:... (default: '
                                                    'that of --checkpoint, else msfuse_cifar)')
    add_model_options(parser)
    stop = parser.add_mutually_exclusive_group()
    stop.add_argument('--budget', metavar='MACS',
                      help='multiply-adds for each image, like 30M or 3e7: the deepest exit within it answers')
    stop.add_argument('--deadline', metavar='MS',
                      help='milliseconds for each image, like 3ms: the deepest exit that this machine reaches by then '
                           'answers, and only its head runs')
    stop.add_argument('--confidence', type=float, metavar='C',
                      help='the first exit whose largest probability reaches this answers')
    add_budget_options(stop, parser)
    parser.add_argument('--uncalibrated', action='store_true',
                        help='raw probabilities, without the stored temperatures')
    parser.add_argument('--engine', choices=ENGINES, default='auto',
                        help='for --average-latency and --deadline: onnx if it is installed, else torch')
    parser.add_argument('--json', action='store_true', help='for programs: a list with one object per image')
    parser.set_defaults(run=run)


@dataclass
class ExitRow:
    """One exit's answer: its number from 1, cumulative MACs, and classes with probabilities, best first."""
    exit: int
    macs: int
    top: List[Tuple[str, float]]


def _row(k: int, probabilities: torch.Tensor, costs: ExitCosts, labels: Sequence[str]) -> ExitRow:
    top = probabilities[0].topk(min(3, len(labels)))
    return ExitRow(k + 1, costs.macs[k], [(labels[i], p) for p, i in zip(*(t.tolist() for t in top))])


def stopping(
        args: argparse.Namespace,
        costs: ExitCosts,
        config: Optional[ExitConfig],
        temperatures: Sequence[float],
        latency: Optional[StageCosts] = None,
) -> Tuple[ExitPolicy, Callable]:
    """The policy that the options ask for, and a function (exit index, confidence) -> why it stopped there.

    Raises:
        InputError: a budget or confidence that cannot be met.
    """
    last = len(temperatures) - 1
    if args.budget is not None:
        budget = parse_macs(args.budget)

        def reason(k: int, confidence: float) -> str:
            if k == last:
                return f'last exit, within the budget of {format_macs(budget)}'
            return f'the next exit needs {format_macs(costs.macs[k + 1])}, the budget is {format_macs(budget)}'
        return ExitPolicy.at_exit(costs.deepest_within(budget), last + 1), reason
    if args.confidence is not None:
        policy = ExitPolicy.at_confidence(args.confidence, temperatures)
    elif asks_for_policy(args):
        policy = requested_policy(args, config, latency)
    else:
        return ExitPolicy.at_exit(last, last + 1), lambda k, confidence: 'all exits ran'

    def reached(k: int, confidence: float) -> str:
        promise = f'; guaranteed: {policy.promise}' if policy.promise else ''
        if k == last:
            return f'last exit{promise}'
        if policy.confidence_at(k) < 0.001:  # see `stopping.solve`: later exits are no better on held-out images
            return f'deeper exits would gain nothing{promise}'
        return f'confidence {confidence:.3f} reaches the threshold {policy.confidence_at(k):.3f}{promise}'
    return policy, reached


def exits_under_policy(
        exits: Iterable[Tuple[int, torch.Tensor]],
        policy: ExitPolicy,
        reason: Callable,
) -> Iterator[Step]:
    """Exits and their logits (1, num_classes), as they are computed, until the policy stops."""
    for k, logits in exits:
        decision = policy.decide(k, logits)
        stops = bool(decision.leaves[0])
        yield k, logits, reason(k, float(decision.confidence[0])) if stops else ''
        if stops:
            return


def exits_in_use(engine: Engine, x: torch.Tensor, policy: ExitPolicy) -> Iterator[Tuple[int, torch.Tensor]]:
    """Runs one image (1, C, H, W) from one exit in use to the next; no other head runs."""
    state = engine.start(x)
    for first, k in segments_of(policy):
        state, logits = engine.run(first, k, state)
        yield k, torch.from_numpy(logits)


def exit_before_deadline(runner: AnytimeRunner, x: torch.Tensor, milliseconds: float) -> Step:
    """Runs one image (1, C, H, W) to the deepest exit that the deadline allows."""
    answer = runner.within_time(x, milliseconds)
    k = int(answer.exit_index[0])
    needed = runner.step_times[tuple(x.shape)][0]
    if needed > milliseconds:
        why = f'late: the first exit needs {needed:.2g} ms on this machine'
    elif k == runner.engine.num_exits - 1:
        why = f'last exit, within {milliseconds:g} ms'
    else:
        why = f'the next exit would end after {milliseconds:g} ms'
    return k, answer.logits, why


def steps_under_options(
        args: argparse.Namespace,
        model: MultiExitNet,
        costs: ExitCosts,
        config: Optional[ExitConfig],
        temperatures: Sequence[float],
) -> Callable[[torch.Tensor], List[Step]]:
    """A function that runs one image (1, C, H, W) as the options say.

    Raises:
        InputError: a budget, deadline or confidence that cannot be met.
    """
    if args.deadline is not None:
        deadline, runner = parse_milliseconds(args.deadline), AnytimeRunner(model, args.engine, costs, temperatures)
        return lambda x: [exit_before_deadline(runner, x, deadline)]
    if args.average_latency is not None:
        parse_latency(args.average_latency, 1.)  # refused before anything is measured
        engine = make_engine(model, args.engine)
        times = profile(model, engine, input_size=config.input_size)
        policy, reason = stopping(args, costs, config, temperatures, times)
        print(f'expected: {policy.expected_ms:.3f} ms per image on average, {times.full:.3f} ms for the full network, '
              f'by the {engine.name} engine on this machine', file=sys.stderr)
        engine.build(segments_of(policy))
        return lambda x: list(exits_under_policy(exits_in_use(engine, x, policy), policy, reason))
    policy, reason = stopping(args, costs, config, temperatures)
    # Every head on the way runs, to be shown.
    return lambda x: list(exits_under_policy(enumerate(model.iter_exits(x)), policy, reason))


def stored_config(args: argparse.Namespace, model: MultiExitNet) -> Optional[ExitConfig]:
    """What is stored with the weights; None if nothing is and no option needs it.

    Raises:
        InputError: an option needs it, or it is of other weights.
    """
    try:
        return stored_exit_config(args, model)
    except MissingFileError:
        if asks_for_policy(args):
            raise
        if args.confidence is not None and not args.uncalibrated:
            print('note: no temperatures are stored with these weights: --confidence is of uncalibrated confidence',
                  file=sys.stderr)
        return None


def run(args: argparse.Namespace) -> int:
    if not args.checkpoint:
        args.model = args.model or 'msfuse_cifar'
    model = load_network(args)
    costs = exit_costs(model)
    stored = stored_config(args, model)
    temperatures = stored.temperatures if stored and not args.uncalibrated else (1.,) * model.num_exits
    steps_of = steps_under_options(args, model, costs, stored, temperatures)
    preprocess = Preprocessing.of(model)
    labels = class_labels(model, stored.class_names if stored else None)
    results, failed = [], False
    for path in named_images(args.images):
        try:
            x, notes = preprocess(path)
        except InputError as error:
            failed = True
            print(f'timm-multiexit: error: {error}', file=sys.stderr)
            results.append(dict(image=str(path), error=str(error)))
            continue
        with torch.inference_mode():
            steps = steps_of(x[None].to(args.device))
        rows = [_row(k, (logits.float() / temperatures[k]).softmax(1), costs, labels) for k, logits, _ in steps]
        why = steps[-1][2]
        share = rows[-1].macs / costs.macs[-1]
        results.append(dict(
            image=str(path), label=rows[-1].top[0][0], probability=rows[-1].top[0][1], exit=rows[-1].exit, reason=why,
            macs=rows[-1].macs, share_of_full_cost=share, notes=notes, exits=[asdict(r) for r in rows]))
        if not args.json:
            print_table(str(path), rows, why, share, notes, model.num_exits)
    if args.json:
        print(json.dumps(results, indent=2))
    return 2 if failed else 0


def print_table(path: str, rows: List[ExitRow], reason: str, share: float, notes: List[str], num_exits: int) -> None:
    print(path)
    for note in notes:
        print(f'  note: {note}')
    width = max(len(label) for row in rows for label, _ in row.top)
    print(f"  {'exit':>4} {'MACs':>9}   {'top-1':<{width + 6}}  then")
    for row in rows:
        cells = [f'{label:<{width}} {p:>5.3f}' for label, p in row.top]
        print(f'  {row.exit:>4} {format_macs(row.macs):>9}   {cells[0]}  ' + '  '.join(cells[1:]).rstrip())
    answer = f'{rows[-1].top[0][0]}, from exit {rows[-1].exit} of {num_exits}'
    print(f'  -> {answer}: {reason}; {share:.0%} of the full cost\n')
