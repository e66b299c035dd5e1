"""Folders of one's own: classes by name, splits, what is left out is named, and the same images are held out again."""
import os
import unicodedata

import numpy as np
import pytest
import torch
from photos import make_photos
from PIL import Image

from timm_multiexit.data.splits import SPLITS, certification_split, open_splits
from timm_multiexit.errors import InputError

CLASSES = ('bag', 'dog 2', 'dog 10', 'Äpfel')


def folder(root, counts, classes=CLASSES):
    return make_photos(root, classes, counts, (4, 4))


def names(splits, split):
    return sorted((splits.classes[t], f.name) for f, t in zip(splits[split].sources, splits[split].targets.tolist()))


def sizes(splits):
    return [len(getattr(splits, name)) for name in SPLITS]


@pytest.mark.parametrize('held, tested', [
    ('', 'test'), ('', 'val'), ('', 'validation'), ('', 'Testing'), ('val', 'test')])
def test_which_folder_is_what(tmp_path, held, tested):
    root = folder(tmp_path, {'train': 20, tested: 3, **({held: 5} if held else {})})
    splits = open_splits('folder', root)
    assert splits.classes == CLASSES  # as people count
    assert sizes(splits) == ([80, 20, 0, 12] if held else [72, 8, 0, 12])
    assert names(splits, 'test') == sorted((c, f'{tested}{i:03d}.png') for c in CLASSES for i in range(3))
    assert splits.test.title == f'{tested}/' and splits.held_out['from'] == f'{held or "train"}/'
    assert splits.development.targets.bincount().tolist() == ([5] * 4 if held else [2] * 4)


@pytest.mark.parametrize('layout', ['', 'train'])
def test_one_set_is_split_three_ways_and_stratified(tmp_path, layout):
    splits = open_splits('folder', folder(tmp_path, {layout: 20}))
    assert sizes(splits) == [56, 8, 0, 16] and splits.held_out['test'] == 16
    assert [splits[name].targets.bincount().tolist() for name in ('train', 'development', 'test')] == [
        [14] * 4, [2] * 4, [4] * 4]
    together = [f for name in ('train', 'development', 'test') for f in splits[name].sources]
    assert len(set(together)) == 80


def test_certification_images_are_held_out_where_they_are_enough(tmp_path):
    root = folder(tmp_path, {'train': 10})
    assert len(open_splits('folder', root).certification) == 0
    asked = open_splits('folder', root, development=4, certification=6)
    assert [len(asked[n]) for n in SPLITS] == [22, 4, 6, 8]
    many = tmp_path / 'many'
    for kind in range(23):
        (many / 'train' / f'{kind:02d}').mkdir(parents=True)
        for i in range(100):
            (many / 'train' / f'{kind:02d}' / f'{i}.png').touch()
        (many / 'test' / f'{kind:02d}').mkdir(parents=True)
        (many / 'test' / f'{kind:02d}' / 'a.png').touch()
    splits = open_splits('folder', many)
    assert sizes(splits) == [2300 - 460, 230, 230, 23]
    assert not set(splits.development.sources) & set(splits.certification.sources)


def test_the_same_images_are_held_out_again_and_added_ones_are_noticed(tmp_path):
    root = folder(tmp_path, {'train': 20, 'test': 2})
    first = open_splits('folder', root, development=12)
    again = open_splits('folder', root, first.classes, held_out=first.held_out)
    assert names(again, 'development') == names(first, 'development') and not again.notes
    for i in range(2):
        Image.new('RGB', (4, 4)).save(root / 'train' / 'bag' / f'new{i}.png')
    more = open_splits('folder', root, first.classes, held_out=first.held_out)
    kept = set(names(first, 'development')) & set(names(more, 'development'))
    assert len(kept) >= 10 and any('not those of the training run' in note for note in more.notes)


def test_a_set_without_splits_is_the_same_under_another_path(tmp_path, monkeypatch):
    root = folder(tmp_path / 'photos', {'': 20})
    first = open_splits('folder', root, development=12, certification=6)
    monkeypatch.chdir(root)
    here = open_splits('folder', '.', first.classes, held_out=first.held_out)
    there = open_splits('folder', root.rename(tmp_path / 'renamed'), first.classes, held_out=first.held_out)
    for again in (here, there):
        assert sizes(again) == [46, 12, 6, 16] and not again.notes
        assert all(names(again, split) == names(first, split) for split in SPLITS)


def test_a_file_name_that_is_not_utf_8(tmp_path):
    root = folder(tmp_path, {'train': 10, 'test': 2})
    photo, other = root / 'train' / 'bag' / 'train000.png', os.fsdecode(b'caf\xe9.jpg')
    photo.rename(photo.with_name(other))
    splits = open_splits('folder', root, development=35)
    assert ('bag', other) in names(splits, 'train') + names(splits, 'development')
    again = open_splits('folder', root, splits.classes, held_out=splits.held_out)
    assert names(again, 'development') == names(splits, 'development') and not again.notes


def test_classes_go_by_name(tmp_path):
    """A class that is missing, and hidden folders, shift no label."""
    root = folder(tmp_path, {'train': 5})
    folder(root, {'val': 2}, ('bag', 'Äpfel'))
    for split in ('train', 'val'):
        (root / split / '.ipynb_checkpoints').mkdir()
        (root / split / '.ipynb_checkpoints' / 'a.png').write_bytes((root / 'val' / 'bag' / 'val000.png').read_bytes())
    (root / 'train' / 'empty').mkdir()
    (root / 'train' / 'bag' / '._train000.png').touch()
    (root / 'train' / 'bag' / 'notes.txt').touch()
    splits = open_splits('folder', root)
    assert splits.classes == CLASSES and splits.test.targets.tolist() == [0, 0, 3, 3]
    notes = '\n'.join(splits.notes)
    for text in ("val/ holds no images of 'dog 2', 'dog 10'", "train/ holds hidden files or folders that are not read: "
                 "'.ipynb_checkpoints'", "not used as classes: 'empty'", 'train/ holds 1 files that are not read'):
        assert text in notes
    # The order of a network's own classes is kept.
    other = open_splits('folder', root, ('Äpfel', 'bag', 'dog 2', 'dog 10', 'zebra'))
    assert other.test.targets.tolist() == [1, 1, 0, 0] and "train/ holds no images of 'zebra'" in '\n'.join(other.notes)


def test_names_in_either_form_of_unicode_are_one_class(tmp_path):
    folder(tmp_path, {'train': 5}, (unicodedata.normalize('NFD', 'Äpfel'), 'bag'))
    folder(tmp_path, {'test': 2}, ('Äpfel', 'bag'))
    splits = open_splits('folder', tmp_path)
    assert splits.classes == ('bag', 'Äpfel') and splits.test.targets.bincount().tolist() == [2, 2]


def test_a_class_called_train_is_no_split(tmp_path):
    splits = open_splits('folder', folder(tmp_path, {'': 10}, ('car', 'train')))
    assert splits.classes == ('car', 'train') and sizes(splits) == [14, 2, 0, 4]


def test_only_test_images(tmp_path):
    splits = open_splits('folder', folder(tmp_path, {'test': 2}), CLASSES)
    assert sizes(splits) == [0, 0, 0, 8]
    with pytest.raises(InputError, match='no development images'):
        splits['development']


@pytest.mark.parametrize('counts, kwargs, words', [
    ({'train': 5, 'val': 2, 'validation': 2}, {}, 'both val/ and validation/: keep one'),
    ({'train': 5, 'test': 2}, {'classes': ('bag', 'dog 2')}, "not trained on, 'dog 10', 'Äpfel'"),
    ({'train': 5, 'test': 2}, {'development': 21}, 'hold out 21 and 0 of the 20 images of train/: hold out fewer'),
    ({'train': 5, 'val': 2, 'test': 2}, {'development': 3}, '--validation-images 3: val/ is held out already'),
    ({'train': 5, 'val': 2, 'test': 2}, {'certification': 9}, 'hold out 0 and 9 of the 8 images of val/'),
    ({}, {}, 'holds no images in class folders'),
])
def test_what_cannot_be_right_is_refused(tmp_path, counts, kwargs, words):
    folder(tmp_path, counts)
    with pytest.raises(InputError, match=words):
        open_splits('folder', tmp_path, **kwargs)
    with pytest.raises(InputError, match='is not a folder: pass --data-dir'):
        open_splits('folder', tmp_path / 'none')


@pytest.mark.parametrize('name', ['photos', 'folders', 'torch', 'nope/cifar10'])
def test_unknown_data_sets_are_not_read_as_folders(tmp_path, name):
    with pytest.raises(InputError, match=f"unknown data set '{name}'"):
        open_splits(name, folder(tmp_path, {'train': 5, 'test': 2}))


def test_timm_s_folders_need_the_same_classes_and_other_images(tmp_path):
    with pytest.raises(InputError, match='other classes in its test images .* or the same images: .*--dataset folder'):
        open_splits('torch/image_folder', folder(tmp_path / 'a', {'train': 5, 'test': 2}))
    with pytest.raises(InputError, match='or the same images'):
        open_splits('torch/image_folder', folder(tmp_path / 'b', {'': 5}))


def test_class_folders_of_certification_images_may_be_links(tmp_path):
    folder(tmp_path / 'elsewhere', {'': 3})
    (tmp_path / 'certify').mkdir()
    for name in CLASSES:
        (tmp_path / 'certify' / name).symlink_to(tmp_path / 'elsewhere' / name)
    assert certification_split(str(tmp_path / 'certify'), CLASSES).targets.bincount().tolist() == [3] * len(CLASSES)


def test_classes_of_torch_data_sets_go_by_name_too(cifar_root):
    reverse = tuple(reversed(open_splits('torch/cifar10', cifar_root).classes))
    splits = open_splits('torch/cifar10', cifar_root, reverse)
    targets = np.asarray(splits.test.sources.dataset.targets)
    assert torch.equal(splits.test.targets, 9 - torch.from_numpy(targets))
    with pytest.raises(InputError, match="data set 'torch/cifar10' holds classes that the network was not trained on"):
        open_splits('torch/cifar10', cifar_root, ('airplane', 'dog'))


def test_a_split_is_divided_without_loss(tmp_path):
    split = open_splits('folder', folder(tmp_path, {'train': 20, 'test': 3})).train
    some, others = split.divided(10)
    assert len(some) == 10 and not set(some.sources) & set(others.sources)
    assert set(some.sources) | set(others.sources) == set(split.sources)
    label = dict(zip(split.sources, split.targets.tolist()))
    assert [label[s] for s in others.sources] == others.targets.tolist()


def test_part_of_a_data_set_is_taken_without_decoding_it(tmp_path):
    """Of one that timm reads from files; pixels of torchvision's are in memory anyway."""
    root = folder(tmp_path, {'train': 20, 'validation': 3})
    splits = open_splits('torch/image_folder', root, development=8)
    for file in root.glob('*/*/*.png'):
        file.write_bytes(b'')
    some, others = splits.train.divided(10)
    assert len(some) == 10 and len(others) == 62
    with pytest.raises(OSError):
        some.sources[0]
