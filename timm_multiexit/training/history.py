"""Where weights come from: the runs that led to them, recorded by each run and handed on to the runs it initialises.

Two files stand beside weights. `history.yaml` lists the runs in order: parents, options, epochs and what each reached;
the last one wrote the weights. `history.csv` is the log of all of them, with a column `run`.
"""
import csv
from dataclasses import asdict, dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any, Dict, List, Optional, Sequence, Union

import yaml

from ..errors import InputError
from ..files import read_yaml, sha256, write_csv, written_beside
from ..pretrained.load import stored_checkpoint

STEPS_NAME = 'history.yaml'
LOG_NAME = 'history.csv'
SUMMARY_NAME = 'summary.csv'  # the log of a run in progress
_PATHS = ('initial_checkpoint', 'kd_checkpoint', 'backbone_checkpoint')  # options that name files
_HEAD = '# Runs in order; options are those that differ from the run above. The last run wrote the weights.\n'


@dataclass(frozen=True)
class Parent:
    """A file of weights that a run started from."""

    file: str  # its name, without folders
    run: str = ''  # id of the run that wrote it; '' if unknown
    epoch: Optional[int] = None  # that of an intermediate checkpoint, from 0; None for the final weights of the run
    sha256: str = ''  # hex digest; '' if not recorded


@dataclass
class Step:
    """One run.

    Attributes:
        run: Its id, unique among all runs.
        parents: The files of `--initial-checkpoint`; with several, the run started from their mean.
        options: Options of train_timm.py, all but those that only say where it ran.
        reached: Top-1 accuracy in percent of the exits and their mean at the end, on the images held out; {} before.
        sha256: Digest of the final weights; '' before.
        before: Where a run was resumed with other options: the epoch, and what they were before it.
    """

    run: str
    parents: List[Parent] = field(default_factory=list)
    options: Dict[str, Any] = field(default_factory=dict)
    reached: Dict[str, float] = field(default_factory=dict)
    sha256: str = ''
    before: Dict[int, Dict[str, Any]] = field(default_factory=dict)


@dataclass
class History:
    """Runs in order, none before its parents, and their logs."""

    steps: List[Step] = field(default_factory=list)
    log: List[Dict[str, str]] = field(default_factory=list)  # rows of all summaries, with their `run`

    @classmethod
    def read(cls, folder: Path) -> 'History':
        """The history of the weights in a folder, of a run in progress too; empty if there is none.

        Raises:
            InputError: the files cannot be read.
        """
        path = folder / STEPS_NAME
        if not path.is_file():
            return cls()
        steps: List[Step] = []
        try:
            for entry in read_yaml(path, 'history'):
                options = {**(steps[-1].options if steps else {}), **entry['options'], 'epochs': entry['epochs']}
                parents = [Parent(**parent) for parent in entry['parents']]
                steps.append(Step(entry['run'], parents, options, entry['reached'], entry.get('sha256', ''),
                                  entry.get('before', {})))
            run = steps[-1].run
        except (TypeError, KeyError, IndexError) as error:
            raise InputError(f"history '{path}' has no runs or lacks a field ({error}): restore the file") from error
        log = read_rows(folder / LOG_NAME)
        log += [{'run': run, **row} for row in read_rows(folder / SUMMARY_NAME)]
        return cls(steps, log)

    def write(self, folder: Path) -> None:
        """Writes both files; options lose the folders of absolute paths."""
        entries, before = [], {}
        for step in self.steps:
            options = portable(step.options)
            changed = {k: v for k, v in options.items() if k != 'epochs' and (k not in before or v != before[k])}
            parents = [{k: v for k, v in asdict(parent).items() if v not in ('', None)} for parent in step.parents]
            entries.append(dict(
                run=step.run, parents=parents, epochs=options['epochs'], options=_Inline(changed),
                reached=_Inline(step.reached), **({'sha256': step.sha256} if step.sha256 else {}),
                **({'before': {k: _Inline(portable(v)) for k, v in step.before.items()}} if step.before else {})))
            before = options
        with written_beside(folder / STEPS_NAME) as partial:
            text = yaml.dump(entries, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=118)
            partial.write_text(_HEAD + text, encoding='utf-8')
        write_csv(folder / LOG_NAME, self.log)


def initial_history(files: Sequence[Union[str, Path]], run: str) -> History:
    """The history of a new run: the histories of its parents, each run once, and the run itself.

    Args:
        files: Those of `--initial-checkpoint`. A file that is not of the run recorded beside it has no known run.
        run: Id of the new run.
    """
    history, parents = History(), []
    for path in map(Path, files):
        origin = History.read(path.parent)
        parent = _identify(path, origin)
        parents.append(parent)
        if parent.run:
            known = {step.run for step in history.steps}
            history.steps += [step for step in origin.steps if step.run not in known]
            history.log += [row for row in origin.log if row['run'] not in known]
    history.steps.append(Step(run, parents))
    return history


def _identify(path: Path, origin: History) -> Parent:
    """The run that wrote a file, if it is the last one of the history beside it: known from digest or checkpoint."""
    digest = sha256(path)
    last = origin.steps[-1] if origin.steps else Step('')
    if digest == last.sha256:
        return Parent(path.name, last.run, sha256=digest)
    if path.suffix != '.safetensors':
        checkpoint = stored_checkpoint(path)
        if last.run and getattr(checkpoint.get('args'), 'run_id', '') == last.run:
            return Parent(path.name, last.run, checkpoint['epoch'], digest)
    return Parent(path.name, sha256=digest)


def portable(options: Dict[str, Any]) -> Dict[str, Any]:
    """Options in which paths, which mean nothing on another machine and tell about this one, are reduced to names."""
    def name(option: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {k: name(k, v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [name(option, v) for v in value]
        if not isinstance(value, str):
            return value
        head, source, place = value.rpartition('local-dir:')
        path = PureWindowsPath(place)  # it knows both separators
        if source or option in _PATHS or path.root or path.drive or place.startswith('~'):
            return head + source + path.name
        return value
    return {k: name(k, v) for k, v in options.items()}


def read_rows(path: Path) -> List[Dict[str, str]]:
    """The rows of a CSV file with a header; none if there is no file."""
    if not path.is_file():
        return []
    with path.open(newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


class _Inline(dict):
    """A mapping written in braces."""


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data):
        return True


_Dumper.add_representer(
    _Inline, lambda dumper, value: dumper.represent_mapping('tag:yaml.org,2002:map', value, flow_style=True))
