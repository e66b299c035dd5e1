"""`timm-multiexit classify IMAGE...`: answers about images, exit by exit, stopping where a budget says."""
import argparse
import json
import sys
from dataclasses import asdict, dataclass
from typing import List, Optional, Tuple

import torch
from timm.data import create_transform, resolve_data_config

from ..errors import InputError
from ..inference.images import read_image
from ..models import MultiExitNet
from ..models._costs import exit_costs
from ..pretrained.exit_config import load_exit_config
from ..pretrained.load import load_model
from ..pretrained.names import require_weights
from ..stopping.costs import ExitCosts, format_macs, parse_macs
from ..stopping.policy import ExitPolicy
from . import add_model_options


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        'classify', help='classify images, exit by exit',
        description='Classifies images, exit by exit. Without a budget all exits run.')
    parser.add_argument('images', nargs='+', metavar='IMAGE')
    parser.add_argument('--model', default='msfuse_cifar', help='name in the registry, hf-hub:... or local-dir:...')
    add_model_options(parser)
    stop = parser.add_mutually_exclusive_group()
    stop.add_argument('--budget', metavar='MACS',
                      help='multiply-adds for each image, like 30M or 3e7: the deepest exit within it answers')
    stop.add_argument('--confidence', type=float, metavar='C',
                      help='the first exit whose largest probability reaches this answers')
    stop.add_argument('--average-budget', metavar='MACS',
                      help="average multiply-adds for each image: stops by the thresholds stored with the weights")
    parser.add_argument('--fast', action='store_true',
                        help='with --average-budget: thresholds that ask fewer exits, which takes less time at equal '
                             'cost and is a little less accurate')
    parser.add_argument('--json', action='store_true', help='for programs: a list with one object an image')
    parser.set_defaults(run=run)


@dataclass
class ExitRow:
    """What one exit said: its number from 1, cumulative MACs, and classes with probabilities, best first."""
    exit: int
    macs: int
    top: List[Tuple[str, float]]


def stopping_rule(args: argparse.Namespace, model: MultiExitNet, costs: ExitCosts):
    """A function (exit index, logits) -> reason to stop there, or None to go on.

    Raises:
        InputError: a budget or confidence that cannot be kept.
    """
    last = model.num_exits - 1
    if args.fast and args.average_budget is None:
        raise InputError('--fast chooses among stored thresholds: pass --average-budget with it')
    if args.budget is not None:
        budget = parse_macs(args.budget)
        deepest = costs.deepest_within(budget)

        def by_budget(k: int, logits: torch.Tensor) -> Optional[str]:
            if k < deepest:
                return None
            if k == last:
                return f'last exit, within the budget of {format_macs(budget)}'
            return f'the next exit needs {format_macs(costs.macs[k + 1])}, the budget is {format_macs(budget)}'
        return by_budget
    if args.confidence is not None:
        if not 0. < args.confidence <= 1.:
            raise InputError(f'--confidence {args.confidence}: give a probability above 0 and up to 1')
        policy = ExitPolicy((args.confidence,) * last + (0.,), (1.,) * (last + 1))
    elif args.average_budget is not None:
        policy = load_exit_config(args.model, args.checkpoint).policy_for(
            parse_macs(args.average_budget), args.fast)
    else:
        return lambda k, logits: 'all exits ran' if k == last else None

    def by_policy(k: int, logits: torch.Tensor) -> Optional[str]:
        if not policy.stops(k, logits):
            return None
        if k == last:
            return 'last exit'
        return f'confidence {float(policy.confidence(k, logits)):.3f} reaches the threshold {policy.thresholds[k]:.3f}'
    return by_policy


@torch.inference_mode()
def classify(model: MultiExitNet, x: torch.Tensor, costs: ExitCosts, rule, labels: List[str]):
    """Runs one image (1, C, H, W) until the rule stops it; returns its rows and the reason."""
    rows, reason = [], None
    for k, logits in enumerate(model.iter_exits(x)):
        probabilities = logits.float().softmax(1)[0]
        top = probabilities.topk(min(3, len(probabilities)))
        rows.append(ExitRow(k + 1, costs.macs[k], [(labels[i], p) for p, i in zip(*(t.tolist() for t in top))]))
        reason = rule(k, logits)
        if reason:
            break
    return rows, reason


def run(args: argparse.Namespace) -> int:
    if not args.checkpoint:
        require_weights(args.model)
    model = load_model(args.model, args.checkpoint, args.num_classes, args.device)
    costs = exit_costs(model)
    rule = stopping_rule(args, model, costs)
    config = resolve_data_config(model=model)
    transform = create_transform(**config)
    names = model.pretrained_cfg.get('label_names') or ()
    labels = list(names) if len(names) == model.num_classes else [f'class {i}' for i in range(model.num_classes)]
    results, failed = [], False
    for path in args.images:
        try:
            image, notes = read_image(path, config['input_size'][-1])
        except InputError as error:
            failed = True
            print(f'timm-multiexit: error: {error}', file=sys.stderr)
            results.append(dict(image=path, error=str(error)))
            continue
        rows, reason = classify(model, transform(image).unsqueeze(0).to(args.device), costs, rule, labels)
        share = rows[-1].macs / costs.macs[-1]
        results.append(dict(
            image=path, label=rows[-1].top[0][0], probability=rows[-1].top[0][1], exit=rows[-1].exit, reason=reason,
            macs=rows[-1].macs, share_of_full_cost=share, notes=notes, exits=[asdict(r) for r in rows]))
        if not args.json:
            print_table(path, rows, reason, share, notes, model.num_exits)
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
