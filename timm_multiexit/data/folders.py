"""Folders of one's own images: which classes and splits they hold, by name."""
import hashlib
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, List, Sequence, Tuple

from ..errors import InputError
from ..inference.images import SUFFIXES, image_files, is_hidden

# Names of the folders of each split, in any case. Without any of them, the folders are the classes of a single set.
SPLIT_FOLDERS = dict(train=('train', 'training'), validation=('validation', 'val', 'valid'), test=('test', 'testing'))


@dataclass
class ClassFolders:
    """The images of one set, ROOT/CLASS/**/IMAGE.

    Attributes:
        title: Its folder in words, like 'val/'.
        files: By class name, sorted; names are in Unicode's composed form, whichever the file system uses.
        notes: What is there and not used.
    """

    title: str
    files: Dict[str, List[Path]] = field(default_factory=dict)
    notes: List[str] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(map(len, self.files.values()))


def find_splits(root: Path) -> Dict[str, ClassFolders]:
    """The sets of images in a folder: by the names of `SPLIT_FOLDERS`, or a single one called 'all'.

    Raises:
        InputError: no such folder, no images in class folders, or two folders for one split.
    """
    if not root.is_dir():
        raise InputError(f"'{root}' is not a folder: pass --data-dir with the folder of the images")
    found: Dict[str, ClassFolders] = {}
    for split, names in SPLIT_FOLDERS.items():
        # A folder with images right in it is a class of that name.
        there = [folder for folder in _entries(root) if folder.name.lower() in names
                 and any(p.is_dir() and not is_hidden(p.name) for p in _entries(folder))]
        if len(there) > 1:
            raise InputError(f"'{root}' holds both {there[0].name}/ and {there[1].name}/: keep one of them")
        if there:
            found[split] = read_classes(there[0], f'{there[0].name}/')
    used = {s.title for s in found.values()}
    unused = [p.name for p in _entries(root) if p.is_dir() and not is_hidden(p.name) and f'{p.name}/' not in used]
    if not found:
        found['all'] = read_classes(root, f'{root.resolve().name}/')
    elif unused:
        next(iter(found.values())).notes.append(f"ignored beside {', '.join(sorted(used))}: {_some(unused)}")
    if not any(found.values()):
        raise InputError(f"'{root}' holds no images in class folders: put them into train/CLASS/, and those to measure "
                         f"on into test/CLASS/, as {', '.join(sorted(SUFFIXES))}")
    return {split: classes for split, classes in found.items() if len(classes)}


def _entries(folder: Path) -> List[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def read_classes(folder: Path, title: str) -> ClassFolders:
    """The images FOLDER/CLASS/**/IMAGE of one set, which reports call `title`."""
    classes = ClassFolders(title)
    hidden, empty, others = [], [], 0
    for entry in _entries(folder):
        if is_hidden(entry.name):
            hidden.append(entry.name)
        elif not entry.is_dir():
            others += 1
        else:
            files = image_files(entry)
            others += sum(p.is_file() and not is_hidden(p.name) for p in entry.rglob('*')) - len(files)
            if files:
                classes.files.setdefault(unicodedata.normalize('NFC', entry.name), []).extend(files)
            else:
                empty.append(entry.name)
    if hidden:
        classes.notes.append(f'{title} holds hidden files or folders that are not read: {_some(hidden)}')
    if empty:
        classes.notes.append(f'{title} holds folders without images, which are not used as classes: {_some(empty)}')
    if others:
        classes.notes.append(f'{title} holds {others} files that are not read: no images, or outside class folders')
    return classes


def check_classes(sets: Sequence[ClassFolders], classes: Sequence[str]) -> List[str]:
    """Checks the class names of sets of images against those that a network knows.

    Returns:
        Notes on classes without images.

    Raises:
        InputError: a class that the network does not know.
    """
    notes = []
    for each in sets:
        if unknown := [name for name in each.files if name not in classes]:
            raise InputError(f'{each.title} holds classes that the network was not trained on, {_some(unknown)} (it '
                             f'knows {_some(classes)}): remove them, or rename them to match')
        if missing := [name for name in classes if name not in each.files]:
            notes.append(f'{each.title} holds no images of {_some(missing)}')
    return notes


def held_out_order(classes: ClassFolders) -> List[Tuple[str, Path]]:
    """All images of a set in the order in which they are held out: any beginning of it is stratified.

    The order within a class is that of a hash of the files' names in it, so that it is the same on every machine, and
    images that are added later change it little.

    Returns:
        (class name, file) of each image.
    """
    keyed = []
    for name, files in classes.files.items():
        ranked = sorted((hashlib.sha256(f'{name}/{file.name}'.encode(
            'utf-8', 'surrogateescape')).hexdigest(), file) for file in files)
        keyed += [((rank + 0.5) / len(files), digest, name, file) for rank, (digest, file) in enumerate(ranked)]
    return [(name, file) for _, _, name, file in sorted(keyed)]


def _some(names: Sequence[str]) -> str:
    """Some of many names, in quotes."""
    listed = ', '.join(f"'{name}'" for name in list(names)[:5])
    return listed + (f' and {len(names) - 5} more' if len(names) > 5 else '')
