"""The model card: front matter, and the text of card.md.jinja. Every figure comes from the files beside the weights."""
import re
import sys
from pathlib import Path
from typing import List, Union

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from model_repo import Network

from timm_multiexit.datasets import find_dataset
from timm_multiexit.stopping.costs import format_macs
from timm_multiexit.training.history import Step

_TEMPLATE = Path(__file__).with_name('card.md.jinja')
_BUDGET_ROWS = 9


def build_card(network: Network, organisation: str) -> ModelCard:
    """The card of a network that an organisation publishes; its model-index holds the accuracy of each exit."""
    known = find_dataset(network.results.dataset)
    dataset, title = (known.hub_id, known.title) if known else (network.tag, network.tag)
    data = ModelCardData(
        license=network.model.pretrained_cfg.get('license') or 'other',
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'timm-multiexit', 'early-exit', 'anytime-prediction'],
        datasets=[dataset] if dataset.count('/') == 1 else None,
        metrics=['accuracy'],
        model_name=network.name,
        eval_results=[
            EvalResult(
                task_type='image-classification', task_name='Image Classification', dataset_type=dataset,
                dataset_name=title, dataset_split='test', metric_type='accuracy', metric_value=e.accuracy,
                metric_name=f"Top-1 accuracy (%), exit {e.exit} ({format_macs(e.macs)} MACs)")
            for e in network.results.exits],
    )
    module = type(network.model).__module__
    every, recipe = network.results.budgeted, network.recipe
    numbers = {step.run: number for number, step in enumerate(network.history.steps, start=1)}
    return ModelCard.from_template(
        data, template_path=str(_TEMPLATE), network=network, dataset=title, plain=plain, macs=format_macs,
        place=f'hf-hub:{organisation}/{network.name}', module=module.rpartition('.')[2],
        backbone=getattr(network.model, '_model_args', {}).get('backbone'),
        architecture=sys.modules[module].__doc__.strip().splitlines()[0],
        parameters=sum(p.numel() for p in network.model.parameters()),
        budgeted=every[::max(1, -(-len(every) // _BUDGET_ROWS))],
        options=[code(f"{k.replace('_', '-')}: {recipe[k]}")
                 for k in ('opt', 'lr', 'batch_size', 'weight_decay', 'sched') if recipe.get(k) is not None],
        teachers=_teachers(recipe.get('kd_model_name') or []), start=lambda step: _start(step, numbers))


def _start(step: Step, numbers: dict) -> str:
    """Such as 'step 15', 'mean of step 6 and step 7', or 'mean of step 16 and step 16 after 260 epochs'."""
    parts = []
    for parent in step.parents:
        known = f'step {numbers[parent.run]}' if parent.run in numbers else code(parent.file)
        parts.append(known if parent.epoch is None else f'{known} after {parent.epoch + 1} epochs')
    return f'mean of {_listed(parts)}' if len(parts) > 1 else _listed(parts)


def _teachers(names: Union[str, List[str]]) -> str:
    """`a`, or the mean of `a`, `b` and `c`, where several runs of one network count."""
    names = [names] if isinstance(names, str) else names
    runs = {name: names.count(name) for name in names}
    listed = _listed([code(name) if n == 1 else f'{n} runs of {code(name)}' for name, n in runs.items()])
    return f'the mean of {listed}' if len(names) > 1 else listed


def code(text: object) -> str:
    """Text as a code span, which nothing in it ends: no Markdown or HTML of another's files is rendered."""
    return '`' + re.sub(r'[`|\s]+', ' ', str(text)) + '`'


def plain(text: object) -> str:
    """Text of which nothing is rendered as Markdown or HTML.

    >>> plain('<b>')
    '&#60;b&#62;'
    """
    return re.sub(r'[^\w\s.,:;+%/-]', lambda found: f'&#{ord(found.group())};', str(text))


def _listed(parts: List[str]) -> str:
    """'a, b and c'."""
    return ' and '.join(filter(None, [', '.join(parts[:-1]), *parts[-1:]]))
