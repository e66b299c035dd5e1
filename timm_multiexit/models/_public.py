"""Checkpoints of the public code of MSDNet (`blocks.*`, `classifier.*`) and RANet (`FirstLayer.*`, `scale_flows.*`,
`classifier.*`), with or without `module.`: the same layers in the same order, under other names."""
from typing import Any, Dict, List

import torch

from ..errors import InputError

_GROUPS = ('FirstLayer.', 'scale_flows.', 'blocks.', 'classifier.')


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: torch.nn.Module) -> Dict[str, Any]:
    """The weights under this package's names; those that have them are returned as they are.

    Raises:
        InputError: weights of neither kind, or of another configuration.
    """
    state = {k.removeprefix('module.'): v for k, v in state_dict.get('state_dict', state_dict).items()}
    if any(k.startswith(('stages.', 'exits.')) for k in state):
        return state
    given = {k: v for group in _GROUPS for k, v in state.items()
             if k.startswith(group) and not k.endswith('num_batches_tracked')}
    public = any(k.startswith('classifier.') for k in given) and any(v.ndim == 4 for v in given.values())
    kind = 'RANet' if 'FirstLayer.' in ''.join(given) else 'MSDNet'
    name = type(model).__name__
    if not public or kind != name:
        what = f'are of the public {kind}' if public else f"have keys like '{next(iter(state), '')}'"
        raise InputError(f'the weights {what}: {name} reads its own and those of its public code')
    own = {k: v for k, v in model.state_dict().items() if not k.endswith('num_batches_tracked')}
    names = [k for k in own if k.startswith('stages.')]
    for k in range(model.num_exits):  # the public code has the classifier after the convolutions
        names += sorted((n for n in own if n.startswith(f'exits.{k}.')), key=lambda n: '.fc.' in n)
    if [v.shape for v in given.values()] != [own[n].shape for n in names]:
        raise InputError(f'the weights are of another {name}: {_differences(given, own, names, model)}')
    return dict(zip(names, given.values()))


def _differences(given: Dict[str, Any], own: Dict[str, Any], names: List[str], model: torch.nn.Module) -> str:
    """What differs, in terms of the options of the network."""
    def convs(tensors):
        return [v for v in tensors if v.ndim == 4]
    exits = len({k.split('.')[1] for k in given if k.startswith('classifier.')})
    theirs = convs(v for k, v in given.items() if k.startswith(('FirstLayer.', 'blocks.0.0.')))
    ours = convs(v for k, v in own.items() if k.startswith('stages.0.layers.0.'))
    layers = [len(convs(v for k, v in tensors.items() if not k.startswith(('classifier.', 'exits.'))))
              for tensors in (given, own)]
    linear = [next(v for k, v in reversed(tensors.items()) if v.ndim == 2) for tensors in (given, own)]
    facts = [
        ('num_classes', linear[0].shape[0], linear[1].shape[0]),
        ('exits (steps or scales)', exits, model.num_exits),
        ('channels of the first maps (base_width times its factors)',
         [len(v) for v in theirs], [len(v) for v in ours]),
        ('size of the first convolution (large_stem)', theirs[0].shape[-1], ours[0].shape[-1]),
        ('convolutions before the exits (steps, block_layers)', *layers)]
    different = [f'{what} {a}, here {b}' for what, a, b in facts if a != b]
    if not different:
        key, a, b = next((k, v.shape, own[n].shape) for (k, v), n in zip(given.items(), names)
                         if v.shape != own[n].shape)
        different = [f"'{key}' has {tuple(a)}, here {tuple(b)} (growth, factors, reduction, head_width)"]
    return '; '.join(different)
