"""One ONNX file that stops by itself: each head, and all that follows an exit, stands in a branch of its own.

The branches are nested, so that an image that leaves at exit k passes 2 k of them, however deep the network is.
"""
import json
from pathlib import Path
from string import Template
from typing import Collection, Sequence, Union

import onnx
from onnx import TensorProto, helper, parser

from ..errors import InputError
from ..files import written_beside
from ..models import MultiExitNet
from ..stopping.config import ExitConfig
from ..stopping.policy import NEVER
from .export import IR_VERSION, preprocessing_of
from .onnx_engine import cut, export_graph, maps_made

DOMAIN = 'timm_multiexit'
_BUDGETS = 11  # for which thresholds are stored
# `policy.scores` of max_softmax, for one image.
_SCORE = '''<domain: "timm_multiexit", opset_import: ["": 18]>
score (logits, temperature) => (score) {
    one = Constant <value = int64[1] {1}> ()
    nothing = Constant <value = float[1, 1] {-inf}> ()
    x = Div (logits, temperature)
    first, place = TopK <axis = 1> (x, one)
    rest = Sub (x, first)
    others = ScatterElements <axis = 1> (rest, place, nothing)
    doubt = ReduceLogSumExp <keepdims = 0> (others, one)
    score = Neg (doubt)
}'''
# What follows a stage, and the same where no stage is left. The nodes of stage and head are put in front.
_EXIT = Template('''
from_$k () => (float[1, $classes] $logits, int64[1] $exit, float[1] $confidence) {
    index_$k = Constant <value_int = $k> ()
    threshold_$k = Gather (thresholds, index_$k)
    never_$k = Constant <value_float = $never> ()
    in_use_$k = Less (threshold_$k, never_$k)
    seen_$k, score_$k = If (in_use_$k) <
        then_branch = head_$k () => (float[1, $classes] logits$k, float[1] head_score_$k) {
            temperature_$k = Constant <value_float = $temperature> ()
            head_score_$k = timm_multiexit.score (logits$k, temperature_$k)
        },
        else_branch = no_head_$k () => (float[1, $classes] no_logits_$k, float[1] no_score_$k) {
            shape_$k = Constant <value = int64[2] {1, $classes}> ()
            no_logits_$k = ConstantOfShape (shape_$k)
            no_score_$k = Constant <value = float[1] {-inf}> ()
        }>
    leaves_$k = GreaterOrEqual (score_$k, threshold_$k)
    $logits, $exit, $confidence = If (leaves_$k) <
        then_branch = leave_$k () => (float[1, $classes] left_$k, int64[1] here_$k, float[1] probability_$k) {
            left_$k = Identity (seen_$k)
            here_$k = Constant <value = int64[1] {$number}> ()
            probability_$k = Sigmoid (score_$k)
        },
        else_branch = go_on_$k () => () {}>
}''')
_LAST_EXIT = Template('''
from_$k () => (float[1, $classes] $logits, int64[1] $exit, float[1] $confidence) {
    $logits = Identity (logits$k)
    $exit = Constant <value = int64[1] {$number}> ()
    temperature_$k = Constant <value_float = $temperature> ()
    score_$k = timm_multiexit.score (logits$k, temperature_$k)
    $confidence = Sigmoid (score_$k)
}''')


def export_single_file(model: MultiExitNet, config: ExitConfig, path: Union[str, Path]) -> None:
    """Writes one ONNX file for single images, in which no stage and no head runs that the thresholds make needless.

    Inputs: `image`, float32 (1, C, H, W), normalised; `thresholds`, float32 (num_exits - 1,), those of an `ExitPolicy`
    without its last, so that one file serves every budget. Outputs: `logits`, float32 (1, num_classes); `exit`, int64
    (1,), from 1; `confidence`, float32 (1,). Metadata `timm_multiexit`, JSON: preprocessing, class_names, exit_macs and
    policies, thresholds for eleven average MACs.

    Args:
        model: The network, in eval mode, with its record.
        config: Its exit config, with scores.
        path: The file to write.

    Raises:
        InputError: a single exit, a confidence other than max_softmax, no scores, images cropped in a way that a
            device does not know, or a file that cannot be written.
    """
    if model.num_exits == 1:
        raise InputError('a network with one exit has nothing to decide: give --output DIR')
    if config.measure != 'max_softmax':
        raise InputError(f"a single file cannot measure confidence by '{config.measure}': export a folder, or "
                         'calibrate with --measure max_softmax')
    preprocessing = preprocessing_of(model)
    graph = _network(model, config.temperatures, preprocessing['input_size'])
    proto = helper.make_model(
        graph, functions=[parser.parse_function(_SCORE)], producer_name='timm-multiexit', ir_version=IR_VERSION,
        opset_imports=[helper.make_opsetid('', 18), helper.make_opsetid(DOMAIN, 1)])
    helper.set_model_props(proto, {DOMAIN: json.dumps(dict(
        preprocessing=preprocessing, class_names=config.class_names, exit_macs=config.exit_macs,
        policies=[dict(average_macs=p.expected_macs, thresholds=p.thresholds[:-1])
                  for p in config.policies(_BUDGETS).values()]))})
    with written_beside(path) as partial:
        partial.write_bytes(proto.SerializeToString())


def _network(model: MultiExitNet, temperatures: Sequence[float], input_size: Sequence[int]) -> onnx.GraphProto:
    """The branches, from the last stage to the first: each goes where the one in front of it goes on."""
    states, whole = export_graph(model, (input_size[1], input_size[2]))
    extractor = onnx.utils.Extractor(whole)
    graph, last = onnx.GraphProto(), model.num_exits - 1
    for k in range(last, -1, -1):
        rest, graph = graph, parser.parse_graph((_LAST_EXIT if k == last else _EXIT).substitute(
            k=k, number=k + 1, classes=model.num_classes, temperature=float(temperatures[k]), never=float(NEVER),
            **{name: f'{name}_{k}' if k else name for name in ('logits', 'exit', 'confidence')}))
        branches = {a.g.name: a.g for node in graph.node if node.op_type == 'If' for a in node.attribute}
        if k < last:
            branches[f'go_on_{k}'].CopyFrom(rest)
        made = maps_made(states, k, k)
        for place, name, inputs, outputs in (
                (branches.get(f'head_{k}', graph), f'head_{k + 1}', states[k + 1][-1:], [f'logits{k}']),
                (graph, f'stage_{k + 1}', states[k], made)):
            part = cut(extractor, states[0][0], inputs, outputs).graph
            _rename(part, f'{name}.', {*inputs, *outputs, ''})
            nodes = [*part.node, *place.node]
            del place.node[:]
            place.node.extend(nodes)
            place.initializer.extend(part.initializer)
    graph.node.insert(0, helper.make_node('Identity', ['image'], [states[0][0]]))
    graph.input.extend([helper.make_tensor_value_info('image', TensorProto.FLOAT, [1, *input_size]),
                        helper.make_tensor_value_info('thresholds', TensorProto.FLOAT, [last])])
    return graph


def _rename(part: onnx.GraphProto, prefix: str, kept: Collection[str]) -> None:
    """Names what two parts may both hold, like shapes, after this one: a name is unique over nested branches."""
    for node in part.node:
        for names in (node.input, node.output):
            names[:] = [name if name in kept else prefix + name for name in names]
    for value in part.initializer:
        value.name = prefix + value.name
