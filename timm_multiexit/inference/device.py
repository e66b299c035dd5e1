"""What runs on a device without PyTorch: an exported folder under a policy, with NumPy, Pillow and onnxruntime alone.

`export` copies this file, and those that it imports, into the folder; `run.py` there calls `main`.
"""
import argparse
import hashlib
import json
import platform
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
from PIL import Image

from ..errors import InputError, first_line, run_command
from ..files import read_json, write_json
from ..stopping.config import FILE_NAME, ExitConfig
from ..stopping.costs import StageCosts, format_macs, parse_macs
from ..stopping.guarantee import RISKS
from ..stopping.monitor import ExitMonitor
from ..stopping.policy import ExitPolicy, StoppingRule, scores
from ..stopping.scores import UNKNOWN, ExitScores
from .batch_loop import gather_arrays, run_batch, run_one, segments_of
from .images import Source, image_paths, named_images, read_image
from .traffic import share_of_full_time

GRAPHS_NAME = 'graphs.json'
PROFILE_NAME = 'profile.json'
SAMPLES_NAME = 'samples'
SAMPLE_SCORES_NAME = 'samples.safetensors'
_PASSES = 30


def merged_name(first: int, last: int) -> str:
    """File of stages and the head after them in one graph, which saves their hand-overs."""
    return f'stage_{first + 1}_to_{last + 1}.onnx'


class FolderEngine:
    """Runs the graphs of a folder: of each stage, of each head, and merged for a policy.

    It has `build`, `start`, `run` and `gather` of `engine.Engine`.

    Args:
        folder: What `export` wrote.

    Raises:
        InputError: a file is missing or damaged, or onnxruntime cannot run it.
    """

    def __init__(self, folder: Union[str, Path]):
        self.folder = Path(folder)
        if not (self.folder / GRAPHS_NAME).is_file():
            raise InputError(f"'{folder}' holds no {GRAPHS_NAME}: give a folder that timm-multiexit export wrote")
        self.graphs: Dict[str, Any] = read_json(self.folder / GRAPHS_NAME, 'list of graphs')
        try:
            for name in self.graphs['sha256']:
                self._read(name)
            self.states: List[List[str]] = self.graphs['states']
            self.num_exits, self.num_classes = len(self.states) - 1, int(self.graphs['num_classes'])
            int(self.graphs['preprocessing']['input_size'][0])  # read later, checked now
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"'{self.folder / GRAPHS_NAME}' is not of an export ({error!r}): export again") from error
        self.sessions: Dict[str, Any] = {}

    def build(self, segments: Sequence[Tuple[int, int]]) -> None:
        for segment in segments:
            for name in self._names(*segment):
                self._session(name)

    def _names(self, first: int, last: int) -> List[str]:
        """The graphs of a segment, in their order."""
        merged = merged_name(first, last)
        if merged in self.graphs['sha256']:
            return [merged]
        return [*(f'stage_{k + 1}.onnx' for k in range(first, last + 1)), f'head_{last + 1}.onnx']

    def _read(self, name: str) -> bytes:
        path = self.folder / name
        data = path.read_bytes() if path.is_file() else b''
        if hashlib.sha256(data).hexdigest() != self.graphs['sha256'][name]:
            raise InputError(f"'{path}' is {'damaged' if path.is_file() else 'missing'}: export again")
        return data

    def _session(self, name: str) -> Any:
        if name not in self.sessions:
            try:
                import onnxruntime
            except ImportError:
                raise InputError('onnxruntime is not installed: python -m pip install onnxruntime') from None
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            options.log_severity_level = 3
            data = self._read(name)  # checked again: the folder may have been replaced since
            try:
                self.sessions[name] = onnxruntime.InferenceSession(
                    data, options, providers=['CPUExecutionProvider'])
            except Exception as error:  # onnxruntime's own types, which it does not document
                reason = first_line(error)
                raise InputError(f'onnxruntime {onnxruntime.__version__} cannot run {name} ({reason}): '
                                 f"export was made for {self.graphs.get('onnxruntime', 'another version')}") from error
        return self.sessions[name]

    def start(self, images: np.ndarray) -> List[np.ndarray]:
        return [np.ascontiguousarray(images, np.float32)]

    def run(self, first: int, last: int, state: List[np.ndarray]) -> Tuple[List[np.ndarray], np.ndarray]:
        maps = dict(zip(self.states[first], state))
        for name in self._names(first, last):
            session = self._session(name)
            made = [output.name for output in session.get_outputs()]
            read = {value.name: maps[value.name] for value in session.get_inputs()}
            maps.update(zip(made, map(np.asarray, session.run(made, read))))
        after = [maps[name] for name in self.states[last + 1] if name in maps]  # a merged graph to the end makes none
        return after, maps[f'logits{last}']

    def gather(self, pieces: Sequence[Tuple[List[np.ndarray], Optional[np.ndarray]]]) -> List[np.ndarray]:
        return gather_arrays(pieces)


def resized(image: Image.Image, size: Tuple[int, int], crop_pct: float, resample: int) -> Image.Image:
    """Covers the image size over `crop_pct`, then takes the centre (height, width), as timm's evaluation does."""
    (height, width), (w, h) = size, image.size
    if height == width:
        short = int(height / crop_pct)
        w, h = (short, int(short * h / w)) if w <= h else (int(short * w / h), short)
    else:
        ratio = min(h / int(height / crop_pct), w / int(width / crop_pct))
        w, h = round(w / ratio), round(h / ratio)
    if (w, h) != image.size:
        image = image.resize((w, h), resample)
    left, top = round((image.width - width) / 2.), round((image.height - height) / 2.)
    return image.crop((left, top, left + width, top + height))


def preprocess(source: Source, how: Dict[str, Any]) -> Tuple[np.ndarray, List[str]]:
    """What the network sees of an image file, by name or open, float32 (C, H, W), and notes for its user.

    Raises:
        InputError: as `images.read_image`.
    """
    channels, *size = how['input_size']
    value_range = None if how['value_range'] is None else tuple(how['value_range'])
    image, notes = read_image(source, min(size), channels, value_range)
    image = resized(image, tuple(size), how['crop_pct'], Image.Resampling[how['interpolation'].upper()])
    x = np.asarray(image, np.float32).reshape(*size, channels).transpose(2, 0, 1)
    mean, std = (np.asarray(how[name], np.float32)[:, None, None] * np.float32(255.) for name in ('mean', 'std'))
    return (x - mean) * (np.float32(1.) / std), notes  # the operations of `datasets.normalize`, equal to the bit


def measure_profile(engine: FolderEngine) -> StageCosts:
    """Milliseconds of each stage and head on this device, medians, kept in the folder."""
    x = np.zeros((1, *engine.graphs['preprocessing']['input_size']), np.float32)
    times = np.zeros((_PASSES, 2, engine.num_exits))
    engine.build([(k, k) for k in range(engine.num_exits)])
    for number in range(-3, _PASSES):
        state = engine.start(x)
        for k in range(engine.num_exits):
            start = time.perf_counter()
            after, logits = engine.run(k, k, state)
            scores(logits)
            whole = time.perf_counter() - start
            start = time.perf_counter()
            scores(engine.sessions[f'head_{k + 1}.onnx'].run(
                None, {engine.sessions[f'head_{k + 1}.onnx'].get_inputs()[0].name: after[-1]})[0])
            head = time.perf_counter() - start
            if number >= 0:
                times[number, :, k] = 1e3 * max(whole - head, 0.), 1e3 * head
            state = after
    stages, heads = ([statistics.median(column) for column in times[:, i].T] for i in range(2))
    write_json(engine.folder / PROFILE_NAME, dict(processor=processor(), stages_ms=stages, heads_ms=heads))
    return StageCosts(tuple(stages), tuple(heads))


def processor() -> str:
    """Family of this machine's processor, and its name where Linux tells it; last digits of logits depend on it."""
    info = Path('/proc/cpuinfo')
    lines = info.read_text(errors='replace').splitlines() if info.is_file() else []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return ' '.join([platform.machine(), *names[:1]])


def all_logits(engine: FolderEngine, images: np.ndarray) -> np.ndarray:
    """Logits of every exit, float32 (num_exits, N, num_classes), of images (N, C, H, W)."""
    state, logits = engine.start(images), []
    for k in range(engine.num_exits):
        state, x = engine.run(k, k, state)
        logits.append(x)
    return np.stack(logits)


def sample_scores(engine: FolderEngine, config: ExitConfig) -> ExitScores:
    """What each exit answers to the sample images of the folder, on this machine."""
    how = engine.graphs['preprocessing']
    logits = all_logits(
        engine, np.stack([preprocess(path, how)[0] for path in image_paths(engine.folder / SAMPLES_NAME)]))
    return ExitScores.from_logits(logits, np.full(len(logits[0]), UNKNOWN), config.temperatures, config.measure)


def check(engine: FolderEngine, config: ExitConfig) -> Tuple[bool, str]:
    """Whether the sample images leave here where they left at export, under the policies of all budgets, and a report.

    Raises:
        InputError: samples or their answers are missing.
    """
    there, here = ExitScores.load(engine.folder / SAMPLE_SCORES_NAME)[0], sample_scores(engine, config)
    if there.scores.shape != here.scores.shape:
        raise InputError(
            f"'{engine.folder / SAMPLES_NAME}' holds other images than {SAMPLE_SCORES_NAME}: export again")
    moved = there.predictions[-1] != here.predictions[-1]
    for policy in config.path():
        moved |= there.exits(policy.thresholds) != here.exits(policy.thresholds)
    import onnxruntime
    return not moved.any(), (
        f'{moved.sum()} of {len(moved)} sample images are answered differently on {processor()} with onnxruntime '
        f'{onnxruntime.__version__} than on {engine.graphs["processor"]} with {engine.graphs["onnxruntime"]}; '
        f'scores differ by up to {abs(there.scores - here.scores).max():.1e}')


def add_stop_options(parser: argparse.ArgumentParser) -> None:
    """Options that `policy_of` reads."""
    stop = parser.add_mutually_exclusive_group()
    stop.add_argument('--average-budget', metavar='MACS', help='average multiply-adds per image, like 30M')
    stop.add_argument('--average-latency', metavar='MS',
                      help="average milliseconds per image, like 2ms, or 50%% of the full network's; run DIR/run.py "
                           '--profile first')
    stop.add_argument('--max-loss', type=float, metavar='POINTS',
                      help='points of accuracy that are lost at most, guaranteed (needs calibrate --certify)')
    stop.add_argument('--confidence', type=float, metavar='C', help='the first exit with this confidence')
    stop.add_argument('--budget', metavar='MACS', help='for each image: the deepest exit within it')
    parser.add_argument('--certainty', type=float, default=0.95, metavar='P', help='probability that --max-loss holds')
    parser.add_argument('--risk', choices=RISKS, default='accuracy', help='what --max-loss bounds')


def policy_of(args: argparse.Namespace, config: ExitConfig, engine: FolderEngine) -> ExitPolicy:
    """The policy that the options ask for.

    Raises:
        InputError: a budget that cannot be kept.
    """
    last = config.num_exits - 1
    if args.average_budget is not None:
        return config.policy_for(args.average_budget)
    if args.average_latency is not None:
        path = engine.folder / PROFILE_NAME
        values = read_json(path, 'profile') if path.is_file() else {}
        if not isinstance(values, dict) or values.get('processor') != processor():
            raise InputError(f"'{engine.folder}' has no times of this machine: run its run.py --profile first")
        times = StageCosts(tuple(values['stages_ms']), tuple(values['heads_ms']))
        image = np.zeros((1, *engine.graphs['preprocessing']['input_size']), np.float32)

        def prepare(rule: StoppingRule) -> Callable[[], Any]:
            segments = segments_of(rule)
            engine.build(segments)
            return lambda: run_one(engine, rule, segments, image)

        profile = replace(times, measure=lambda policy: times.full * share_of_full_time(prepare, policy))
        return config.policy_for(average_ms=args.average_latency, profile=profile)
    if args.max_loss is not None:
        return config.policy_for(max_loss=args.max_loss, certainty=args.certainty, risk=args.risk)
    if args.confidence is not None:
        return ExitPolicy.at_confidence(args.confidence, config.temperatures)
    if args.budget is not None:
        last = config.costs.deepest_within(parse_macs(args.budget))
    return ExitPolicy.at_exit(last, config.num_exits, config.temperatures)


def open_folder(folder: Union[str, Path]) -> Tuple[FolderEngine, ExitConfig]:
    """The network of an exported folder and its config.

    Raises:
        InputError: no such folder, damaged, or a config of another network.
    """
    engine, config = FolderEngine(folder), ExitConfig.load(Path(folder) / FILE_NAME)
    config.check_network(engine, engine.graphs.get('weights', ''))
    return engine, config


class Answer(NamedTuple):
    """What the network says of an image: the exit and the class, from 0, its confidence, and notes for the user."""

    exit_index: int
    prediction: int
    confidence: float
    notes: List[str]


def answer_images(
        engine: FolderEngine,
        policy: StoppingRule,
        sources: Sequence[Source],
        chunk_size: int,
) -> List[Union[Answer, InputError]]:
    """The answer for each image, run as one batch, or the reason why it has none; the others have theirs.

    Raises:
        InputError: NaN logits.
    """
    prepared: List[Union[List[str], InputError]] = []
    images = []
    for source in sources:
        try:
            image, notes = preprocess(source, engine.graphs['preprocessing'])
            images.append(image)
            prepared.append(notes)
        except InputError as error:
            prepared.append(error)
        except Exception as error:  # Pillow's readers raise more than they document
            prepared.append(InputError(f'the image cannot be read ({type(error).__name__}: {error}): save it again'))
    if not images:
        return [notes for notes in prepared if isinstance(notes, InputError)]
    answers = run_batch(engine, policy, segments_of(policy), np.stack(images), chunk_size)
    rows = zip(answers.exit_index.tolist(), answers.prediction.tolist(), answers.confidence.tolist())
    return [notes if isinstance(notes, InputError) else Answer(*next(rows), notes) for notes in prepared]


def classify(engine: FolderEngine, config: ExitConfig, policy: ExitPolicy, paths: Sequence[Path],
             batch_size: int, monitor: Optional[ExitMonitor] = None) -> Iterator[Dict[str, Any]]:
    """One record for each file, in order, with its answer or the reason why it has none.

    A monitor is told where images leave, batch by batch; the next batches run under its policy.
    """
    names = config.names_of(engine.num_classes)
    for start in range(0, len(paths), batch_size):
        batch = paths[start:start + batch_size]
        answers = answer_images(engine, policy, batch, batch_size)
        exits = [answer.exit_index for answer in answers if isinstance(answer, Answer)]
        if monitor is not None and exits:
            monitor.update(np.array(exits))
            policy = monitor.policy
        for path, answer in zip(batch, answers):
            if isinstance(answer, InputError):
                yield dict(image=str(path), error=str(answer))
                continue
            k, label, confidence, notes = answer
            yield dict(image=str(path), notes=notes, label=names[label], probability=confidence, exit=k + 1,
                       macs=config.exit_macs[k])


def main(folder: Path, argv: Optional[Sequence[str]] = None) -> int:
    """The command of an exported folder; returns the exit code."""
    parser = argparse.ArgumentParser(prog='run.py', description='Classifies images, stopping early.')
    parser.add_argument('images', nargs='*', metavar='IMAGE', help='files, folders or quoted patterns')
    add_stop_options(parser)
    parser.add_argument('--batch-size', type=int, default=32, metavar='N')
    parser.add_argument('--profile', action='store_true', help='measure this device and keep it in the folder')
    parser.add_argument('--check', action='store_true',
                        help='compare the answers to sample images with those of the exporting machine; status 1 if '
                             'they differ')
    parser.add_argument('--monitor', action='store_true',
                        help='compare the shares of the exits with those of calibration; warn if they differ beyond '
                             'chance')
    parser.add_argument('--max-average', metavar='MACS',
                        help='stop earlier while the average since start is above this, like 30M')
    parser.add_argument('--json', action='store_true', help='for programs: a list with one object per image')

    def run(argv: Sequence[str]) -> int:
        args = parser.parse_args(argv)
        engine, config = open_folder(folder)
        if args.profile:
            times = measure_profile(engine)
            print(f'{times.full:.3f} ms for the full network, {times.cheapest:.3f} ms for the first exit',
                  file=sys.stderr)
        if args.check:
            same, report = check(engine, config)
            print(f'run.py: {"check" if same else "warning"}: {report}', file=sys.stderr)
            if not same:
                return 1
        if not (args.images or args.profile or args.check) or args.batch_size < 1:
            raise InputError('give image files or folders, --profile or --check; and a --batch-size of 1 or more')
        paths = named_images(args.images)
        policy, monitor = policy_of(args, config, engine), None
        if args.monitor or args.max_average is not None:
            monitor = ExitMonitor(config, policy, args.max_average)
        results = list(classify(engine, config, policy, paths, args.batch_size, monitor))
        if monitor is not None and monitor.images:
            print(f"run.py: {'warning: ' + monitor.warning if monitor.warning else monitor}", file=sys.stderr)
        if args.json:
            print(json.dumps(results, indent=2))
        else:
            for r in results:
                print(f"{r['image']}: " + (r['error'] if 'error' in r else f"{r['label']} {r['probability']:.3f}, exit "
                                           f"{r['exit']} of {config.num_exits}, {format_macs(r['macs'])} MACs"))
        return 2 if any('error' in r for r in results) else 0

    return run_command('run.py', run, argv)
