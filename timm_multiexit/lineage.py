"""The runs that led to weights: what each leaves beside them, and in which order."""
from pathlib import Path
from typing import Dict, Iterable, List

from .store import RECIPE_NAME

# What a run tells of itself. Beside its weights lie those of the runs before it too, as `run1-recipe.yaml` and so on.
RUN_FILES = (RECIPE_NAME, 'summary.csv')


def earlier_prefixes(folder: Path) -> List[str]:
    """What the files of the runs before the one in a folder begin with there, first to last: 'run1-' and so on."""
    count = len([*folder.glob(f'run*-{RECIPE_NAME}')])
    return [f'run{number}-' for number in range(1, count + 1)]


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
