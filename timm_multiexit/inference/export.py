"""A self-contained folder for devices without PyTorch: a graph for each stage and head, and what decides to stop."""
import hashlib
import shutil
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Union

import onnx
import onnxruntime
from timm.data import resolve_data_config

from ..errors import InputError
from ..files import read_json, replaced, write_json
from ..models import MultiExitNet
from ..pretrained.record import training_data
from ..stopping.config import FILE_NAME, ExitConfig
from ..stopping.policy import StoppingRule
from .batch_loop import Segment, segments_of
from .device import (
    GRAPHS_NAME,
    SAMPLE_SCORES_NAME,
    SAMPLES_NAME,
    FolderEngine,
    merged_name,
    processor,
    sample_scores,
)
from .onnx_engine import cut, export_graph, maps_made
from .preprocess import Preprocessing

PACKAGE = Path(__file__).resolve().parent.parent
# What a device runs, copied as it is.
COPIED = ('errors.py', 'files.py', 'stopping/*.py', 'inference/__init__.py', 'inference/batch_loop.py',
          'inference/device.py', 'inference/images.py', 'inference/traffic.py')
RUN = '''"""Classifies images with the network of this folder: python run.py IMAGE... [--average-budget 25M]."""
import sys
from pathlib import Path

from timm_multiexit.inference.device import main

sys.exit(main(Path(__file__).resolve().parent))
'''
IR_VERSION = 10  # of the oldest onnxruntime that runs opset 18 graphs of this exporter


def export_folder(
        model: MultiExitNet,
        config: ExitConfig,
        folder: Union[str, Path],
        rule: Optional[StoppingRule] = None,
) -> List[Path]:
    """Writes the folder beside its place and renames it, so that a folder written twice is never half.

    Args:
        model: The network, in eval mode, with its record.
        config: Its exit config.
        folder: Where to write; an earlier export there is replaced, anything else is refused.
        rule: For which stages between the exits that it evaluates are also written as one graph.

    Returns:
        The graphs.

    Raises:
        InputError: the folder holds something else, or images are cropped in a way that a device does not know.
    """
    with replaced(folder, GRAPHS_NAME) as made:
        graphs = write_graphs(model, made, segments_of(rule) if rule else ())
        add_runner(made, config)
    return [Path(folder) / name for name in graphs]


def add_runner(made: Path, config: ExitConfig) -> None:
    """Adds to a folder of graphs what decides and runs: the exit config, run.py, and sample images with answers."""
    config.save(made / FILE_NAME)
    graphs = made / GRAPHS_NAME
    write_json(graphs, {**read_json(graphs, 'list of graphs'), 'weights': config.weights})
    for pattern in COPIED:
        for source in PACKAGE.glob(pattern):
            target = made / 'timm_multiexit' / source.relative_to(PACKAGE)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    (made / 'timm_multiexit' / '__init__.py').write_text('"""The part of timm-multiexit that a device runs."""\n')
    (made / 'run.py').write_text(RUN, encoding='utf-8')
    shutil.copytree(PACKAGE / 'samples', made / SAMPLES_NAME)
    sample_scores(FolderEngine(made), config).save(made / SAMPLE_SCORES_NAME)


def preprocessing_of(model: MultiExitNet) -> Dict[str, Any]:
    """How a device prepares images, see `device.preprocess`.

    Raises:
        InputError: images are cropped in a way that a device does not know.
    """
    preprocessing, cfg = Preprocessing.of(model), model.pretrained_cfg
    if cfg.get('crop_mode', 'center') != 'center':
        raise InputError(f"images cropped by '{cfg['crop_mode']}': a device crops the centre only")
    return dict(
        input_size=list(preprocessing.input_size), mean=list(preprocessing.mean), std=list(preprocessing.std),
        interpolation=preprocessing.interpolation, crop_pct=float(resolve_data_config(model=model)['crop_pct']),
        value_range=training_data(model).value_range)


def write_graphs(model: MultiExitNet, folder: Path, merged: Sequence[Segment] = ()) -> List[str]:
    """Writes the graphs of stages and heads, those of merged segments, and their list; returns their names."""
    preprocessing = preprocessing_of(model)
    states, graph = export_graph(model, preprocessing['input_size'][1:])
    extractor = onnx.utils.Extractor(graph)
    parts = {}
    for k in range(model.num_exits):
        parts[f'stage_{k + 1}.onnx'] = states[k], maps_made(states, k, k)
        parts[f'head_{k + 1}.onnx'] = states[k + 1][-1:], [f'logits{k}']
    ends = [*states[:-1], []]  # nothing goes on from the last exit
    for first, last in merged:
        if first < last:
            parts[merged_name(first, last)] = states[first], [f'logits{last}', *maps_made(ends, first, last)]
    digests = {}
    for name, (inputs, outputs) in parts.items():
        part = cut(extractor, states[0][0], inputs, outputs)
        part.ir_version = IR_VERSION
        data = part.SerializeToString()
        (folder / name).write_bytes(data)
        digests[name] = hashlib.sha256(data).hexdigest()
    write_json(folder / GRAPHS_NAME, dict(
        states=states, num_classes=model.num_classes, precision='float32', onnxruntime=onnxruntime.__version__,
        processor=processor(), sha256=digests, preprocessing=preprocessing))
    return list(digests)
