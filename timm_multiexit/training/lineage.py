"""The runs that led to weights: what each leaves beside them, and in which order."""
from pathlib import Path
from typing import Any, Dict, Iterable, List, Sequence

from ..stopping.config import RECIPE_NAME

# What a run tells of itself. Beside its weights lie those of the runs before it too, as `run1-recipe.yaml` and so on.
RUN_FILES = (RECIPE_NAME, 'summary.csv')


def run_prefix(number: int) -> str:
    """What the files of an earlier run, 1 for the first, begin with beside weights."""
    return f'run{number}-'


def earlier_prefixes(folder: Path) -> List[str]:
    """What the files of the runs before the one in a folder begin with there, first to last."""
    count = len([*folder.glob(f'run*-{RECIPE_NAME}')])
    return [run_prefix(number) for number in range(1, count + 1)]


def write_earlier_runs(folder: Path, starts: Iterable[Path]) -> None:
    """Writes beside weights the files of the runs that led to those in `starts`, as `earlier_runs` finds them there."""
    for number, run in enumerate(earlier_runs(starts), start=1):
        for name, content in run.items():
            (folder / f'{run_prefix(number)}{name}').write_bytes(content)


def earlier_runs(folders: Iterable[Path]) -> List[Dict[str, bytes]]:
    """The runs that led to the weights in some folders, the folders' own included, each once and first to last.

    Args:
        folders: As train_timm.py exports them; one without such files, where weights of others lie, adds nothing.

    Returns:
        For each run, contents by the names of `RUN_FILES`.
    """
    runs: List[Dict[str, bytes]] = []
    for folder in folders:
        for prefix in (*earlier_prefixes(folder), ''):
            paths = {name: folder / f'{prefix}{name}' for name in RUN_FILES}
            run = {name: path.read_bytes() for name, path in paths.items() if path.is_file()}
            if run and run not in runs:  # runs that several folders share
                runs.append(run)
    return runs


def starting_runs(recipes: Sequence[Dict[str, Any]]) -> List[List[int]]:
    """The runs whose weights each run began with, where the order of the runs tells it.

    Recipes name files of their starts, not runs, and no run's recipe names the file that it wrote. But `earlier_runs`
    puts each behind all that led to it: a folder that is named for the first time is of the latest run that nothing
    has begun with so far, and several such folders are of as many, in their order. Two files of one folder are of one
    run, as of its end and of an earlier epoch.

    Args:
        recipes: Options of runs 1, 2, ... as train_timm.py writes them.

    Returns:
        For each, numbers of earlier runs from 1, as often as the recipe names each; [] for a run that began anew or
        with weights of none of them, and where its recipe has no folder before a file's name, as in published ones.
    """
    made_by: Dict[str, int] = {}
    starts: List[List[int]] = []
    for number, recipe in enumerate(recipes, start=1):
        files = recipe.get('initial_checkpoint') or []
        files = [files] if isinstance(files, str) else files  # one may stand alone
        folders = [str(Path(file).parent) for file in files]
        if '.' not in folders:
            new = [folder for folder in dict.fromkeys(folders) if folder not in made_by]
            free = [n for n in range(1, number) if n not in made_by.values()]
            if len(new) <= len(free):
                made_by.update(zip(new, free[len(free) - len(new):]))
        starts.append([made_by[folder] for folder in folders] if all(f in made_by for f in folders) else [])
    return starts
