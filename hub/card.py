"""The model card: front matter and text. Every figure comes from the files stored beside the weights."""
import sys
from typing import Any, Dict, List, Union

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from model_repo import Network

from timm_multiexit.datasets import find_dataset
from timm_multiexit.stopping.costs import format_macs
from timm_multiexit.training.history import LOG_NAME, STEPS_NAME, Step

# What to cite, by the module of the architecture.
_MSFUSE = """@inproceedings{addad2023multiexit,
  title     = {Multi-Exit Resource-Efficient Neural Architecture for Image Classification with Optimized Fusion Block},
  author    = {Addad, Youva and Lechervy, Alexis and Jurie, Fr{\\'e}d{\\'e}ric},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision (ICCV) Workshops},
  pages     = {1486--1491},
  year      = {2023},
  url       = {https://hal.science/hal-04181149}
}"""
_MSDNET = """@inproceedings{huang2018multiscale,
  title     = {Multi-Scale Dense Networks for Resource Efficient Image Classification},
  author    = {Huang, Gao and Chen, Danlu and Li, Tianhong and Wu, Felix and van der Maaten, Laurens and
               Weinberger, Kilian Q.},
  booktitle = {International Conference on Learning Representations},
  year      = {2018},
  url       = {https://arxiv.org/abs/1703.09844}
}"""
_RANET = """@inproceedings{yang2020resolution,
  title     = {Resolution Adaptive Networks for Efficient Inference},
  author    = {Yang, Le and Han, Yizeng and Chen, Xi and Song, Shiji and Dai, Jifeng and Huang, Gao},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year      = {2020},
  url       = {https://arxiv.org/abs/2003.07326}
}"""
CITATIONS = dict(msfuse=_MSFUSE, msdnet=_MSDNET, ranet=_RANET, resnet_mc=_MSDNET, densenet_mc=_MSDNET)

_BUDGET_ROWS = 9


def build_card(network: Network, organisation: str) -> ModelCard:
    """The card of a network that an organisation publishes."""
    data = card_data(network)
    parts = [
        f'---\n{data.to_yaml()}\n---', f'# Model card for {network.name}', _what_it_is(network), _exits(network),
        _budgets(network), _usage(network, f'hf-hub:{organisation}/{network.name}'), _training(network),
        _limits(network), _citation(network)]
    return ModelCard('\n\n'.join(p.strip() for p in parts if p) + '\n')


def card_data(network: Network) -> ModelCardData:
    """Front matter; its model-index holds the accuracy of each exit."""
    dataset, title = _dataset(network)
    known = dataset.count('/') == 1
    results = [
        EvalResult(
            task_type='image-classification', task_name='Image Classification', dataset_type=dataset,
            dataset_name=title, dataset_split='test', metric_type='accuracy', metric_value=e.accuracy,
            metric_name=f"Top-1 accuracy (%), exit {e.exit} ({format_macs(e.macs)} MACs)")
        for e in network.results.exits]
    return ModelCardData(
        license=network.model.pretrained_cfg.get('license') or 'other',
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'timm-multiexit', 'early-exit', 'anytime-prediction'],
        datasets=[dataset] if known else None,
        metrics=['accuracy'],
        model_name=network.name,
        eval_results=results,
    )


def _dataset(network: Network):
    name = network.results.dataset
    known = find_dataset(name)
    return (known.hub_id, known.title) if known else (network.tag, network.tag)


def _what_it_is(network: Network) -> str:
    cfg, exits = network.model.pretrained_cfg, network.exits
    module = sys.modules[type(network.model).__module__].__doc__.strip().splitlines()[0]
    size = ' x '.join(map(str, exits.input_size[1:]))
    rows = [
        'A multi-exit image classifier: it can answer at any of several classifiers (exits) along its depth. Easy '
        'images stop early, hard ones use the whole network, and the cost of each exit is known in advance.',
        f'- **Architecture:** {module}']
    if cfg.get('paper_name'):
        rows.append(f"- **Paper:** [{cfg['paper_name']}]({cfg['origin_url']})")
    weights = sum(p.numel() for p in network.model.parameters())
    rows += [
        f'- **Trained on:** {_dataset(network)[1]}, {network.model.num_classes} classes, {size} pixel images',
        f'- **Parameters:** {weights / 1e6:.2f} M',
        f'- **Exits:** {exits.num_exits}, from {format_macs(exits.exit_macs[0])} to '
        f'{format_macs(exits.exit_macs[-1])} multiply-adds (MACs) per image',
        '- **Package:** `timm-multiexit`, which registers the architecture in timm when imported']
    return rows[0] + '\n\n' + '\n'.join(rows[1:])


def _exits(network: Network) -> str:
    rows = [
        [str(e.exit), format_macs(e.macs), f'{e.params / 1e6:.2f} M', f'{e.accuracy:.2f}',
         f'{e.calibration_error:.2f}', f'{e.calibration_error_with_temperature:.2f}', f'{e.temperature:.3f}']
        for e in network.results.exits]
    head = ['exit', 'MACs', 'parameters', 'top-1 (%)', 'calibration error (%)', 'with temperature (%)', 'temperature']
    return (
        f"## Exits\n\nMeasured on {network.results.test_images:,} test images. Costs are cumulative, up to and "
        f"including that exit. Temperatures were fitted on {network.results.validation_images:,} validation images."
        f"\n\n{_table(head, rows)}\n\n"
        '![Accuracy and cost of each exit](anytime.png)')


def _budgets(network: Network) -> str:
    every = network.results.budgeted['search']
    step = max(1, -(-len(every) // _BUDGET_ROWS))
    rows = []
    for point in every[::step]:
        shares = ' / '.join(f'{100 * s:.0f}' for s in point.exit_shares)
        rows.append([format_macs(point.budget), format_macs(point.average_macs), f'{point.accuracy:.2f}', shares])
    head = ['average budget', 'average MACs on the test set', 'top-1 (%)', 'images leaving at each exit (%)']
    fast, gains = '', network.results.comparison
    if network.exits.fast_policies:
        fast = (' A second set of thresholds, `policy_for(budget, fast=True)`, evaluates fewer exits and is faster '
                f'at equal cost; its accuracy differs by {gains.mean_gain_fast:+.2f} points on average and by '
                f'{gains.smallest_gain_fast:+.2f} at worst.')
    return (
        '## Average budgets\n\nThresholds for these budgets are stored with the weights. They were chosen on '
        f'validation images and measured on the test set.{fast}\n\n{_table(head, rows)}\n\n'
        '![Accuracy and average cost](budgeted.png)')


def _table(head: List[str], rows: List[List[str]]) -> str:
    lines = ['| ' + ' | '.join(head) + ' |', '|' + '|'.join([' ---: '] * len(head)) + '|']
    return '\n'.join(lines + ['| ' + ' | '.join(row) + ' |' for row in rows])


_OPEN = """import timm_multiexit  # registers the architecture
import timm, torch
from importlib.resources import files
from PIL import Image

image = Image.open(files('timm_multiexit') / 'samples' / 'cifar10_test_0001_ship.png')
"""

# The three ways that timm's own cards show, then two of this package.
_SNIPPETS = {
    'Image classification': """model = timm.create_model('{place}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
with torch.inference_mode():
    output = model(transform(image).unsqueeze(0))  # logits of the last exit
top3_probabilities, top3_classes = output.softmax(1).topk(3)
""",
    'Feature maps': """model = timm.create_model('{place}', pretrained=True, features_only=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
with torch.inference_mode():
    maps = model(transform(image).unsqueeze(0))
for feature_map in maps:  # the input of each exit, shallow to deep
    print(feature_map.shape)
""",
    'Image embeddings': """model = timm.create_model('{place}', pretrained=True, num_classes=0).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
with torch.inference_mode():
    embedding = model(transform(image).unsqueeze(0))  # (1, {features})
""",
    'Anytime prediction': """model = timm.create_model('{place}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
with torch.inference_mode():
    for exit_index, logits in enumerate(model.iter_exits(transform(image).unsqueeze(0))):
        probability, label = logits.softmax(1).max(1)
        if probability > 0.9:
            break  # deeper stages do not run
""",
    'Budgeted classification': """from timm_multiexit import load_exit_config

model = timm.create_model('{place}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
policy = load_exit_config('{place}').policy_for(average_budget={budget})  # multiply-adds per image
with torch.inference_mode():
    for exit_index, logits in enumerate(model.iter_exits(transform(image).unsqueeze(0))):
        if policy.decide(exit_index, logits).leaves:
            break
label = logits.argmax(1)
""",
}


def _usage(network: Network, place: str) -> str:
    policies = network.exits.policies
    budget = f'{policies[len(policies) // 2].budget:.3g}' if policies else ''
    values = dict(place=place, features=network.model.num_features, budget=budget)
    parts = [
        '## Usage', 'Install `timm-multiexit` from a clone first: `python -m pip install .`']
    for title, code in _SNIPPETS.items():
        if 'budget}' in code and not policies:
            continue
        parts.append(f'### {title}\n\n```python\n{_OPEN}{code.format(**values)}```')
    if policies:
        parts.append(
            f'On the command line:\n\n```bash\ntimm-multiexit classify IMAGE --model {place} --average-budget '
            f'{float(budget) / 1e6:g}M\n```')
    return '\n\n'.join(parts)


def _training(network: Network) -> str:
    recipe: Dict[str, Any] = network.recipe
    steps = network.history.steps
    teachers = ''
    if recipe.get('kd_model_name'):
        teachers = f" Its exits were also distilled from {_teachers(recipe['kd_model_name'])}."
    return (
        f"## Training\n\nTrained with `train_timm.py` of the package on {_dataset(network)[1]}: "
        f'{_course(recipe, steps[-1])}.{teachers} All options are in [recipe.yaml](recipe.yaml), the log is in '
        f'[{LOG_NAME}]({LOG_NAME}).\n\n{_steps(steps)}')


def _course(recipe: Dict[str, Any], step: Step) -> str:
    """The length and main options of the run, or the weights that it averages."""
    if recipe.get('epochs') == 0:
        count = len(step.parents)
        weights = f'the mean of {count} sets of weights' if count > 1 else 'the weights of a run'
        return f'{weights}, with BN statistics from one more pass over the training images and no further epochs'
    facts = [f"`{k.replace('_', '-')}: {recipe[k]}`" for k in ('opt', 'lr', 'batch_size', 'weight_decay', 'sched')
             if recipe.get(k) is not None]
    epochs = f"{recipe['epochs']} epochs, " if 'epochs' in recipe else ''
    processes = recipe.get('world_size') or 1
    return epochs + ', '.join(facts) + (f', in {processes} processes of `torchrun`' if processes > 1 else '')


def _steps(steps: List[Step]) -> str:
    """The runs that led to the weights, or how to repeat the only one."""
    if len(steps) == 1 and not steps[0].parents:
        return ('To train it again:\n\n```bash\n'
                'python train_timm.py --config recipe.yaml --data-dir DATA --output RUNS\n```')
    numbers = {step.run: number for number, step in enumerate(steps, start=1)}
    rows = [[str(numbers[step.run]), step.run, _start(step, numbers), str(step.options['epochs']),
             f"{step.reached['top1_mean']:.2f}" if step.reached else ''] for step in steps]
    head = ['step', 'run', 'starts from', 'epochs', 'mean top-1 of the exits (%), held-out images']
    return (f'These weights are the last of {len(steps)} runs, each with the options in [{STEPS_NAME}]({STEPS_NAME}):'
            f'\n\n{_table(head, rows)}')


def _start(step: Step, numbers: Dict[str, int]) -> str:
    """Such as 'step 15', 'mean of step 6 and step 7', or 'mean of step 16 and step 16 after 260 epochs'."""
    parts = []
    for parent in step.parents:
        known = f'step {numbers[parent.run]}' if parent.run in numbers else f'`{parent.file}`'
        parts.append(known if parent.epoch is None else f'{known} after {parent.epoch + 1} epochs')
    if len(parts) < 2:
        return ''.join(parts)
    return f"mean of {', '.join(parts[:-1])} and {parts[-1]}"


def _teachers(names: Union[str, List[str]]) -> str:
    """`a`, or the mean of `a`, `b` and `c`, where several runs of one network count."""
    names = [names] if isinstance(names, str) else names
    if len(names) == 1:
        return f'`{names[0]}`'
    runs = {name: names.count(name) for name in names}
    parts = [f'`{name}`' if n == 1 else f'{n} runs of `{name}`' for name, n in runs.items()]
    return f"the mean of {' and '.join(filter(None, [', '.join(parts[:-1]), parts[-1]]))}"


def _limits(network: Network) -> str:
    size = ' x '.join(map(str, network.exits.input_size[1:]))
    return (
        f'## Limits\n\n- It assigns every image to one of the {network.model.num_classes} classes of '
        f'{_dataset(network)[1]}. Images are resized to {size} pixels.\n'
        '- Costs count the multiply-adds of convolutions and linear layers. Latency also depends on the machine and '
        'the batch size.\n'
        '- An average budget holds for images like the validation images. If images are harder, fewer stop early and '
        'the average cost rises.\n'
        '- An early exit can be confident and wrong, and confidence is not calibrated on other kinds of images.\n'
        '- Accuracy is of one training run; the variance between runs was not measured.')


def _citation(network: Network) -> str:
    entry = CITATIONS.get(type(network.model).__module__.rpartition('.')[2])
    return f'## Citation\n\n```bibtex\n{entry}\n```' if entry else ''
