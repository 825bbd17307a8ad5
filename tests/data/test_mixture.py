import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from timm_amf.data import Component, DataSpec, create_dataset, create_datasets, create_loader
from timm_amf.errors import UserError


def spec(*components):
    return DataSpec(tuple(components))


def names(dataset):
    """(component, class, split, file) of each sample, from the paths alone."""
    return [tuple(Path(dataset.filename(i)).parts[-4:]) for i in range(len(dataset))]


def test_one_folder(make_folder):
    root = make_folder(number=3)
    train, val = create_datasets(spec(Component('images', root=str(root))))
    assert names(train) == [('images', 'train', label, f'{i}.png') for label in 'abc' for i in range(3)]
    assert names(val) == [('images', 'val', label, f'{i}.png') for label in 'abc' for i in range(3)]
    assert train.targets.tolist() == np.repeat([0, 1, 2], 3).tolist()
    assert (train.class_names, train.components) == (['a', 'b', 'c'], ['images'])
    image, target, component = train[4]
    assert (target, component) == (1, 0)
    assert np.array_equal(image, Image.open(root / 'train' / 'b' / '1.png').convert('RGB'))


def test_two_folders_with_first_classes_and_images(make_folder):
    one = make_folder('one', classes=['x10', 'x9', 'x1'], number=5)
    two = make_folder('two', classes=['x1', 'y'], number=4)
    data = create_dataset(spec(
        Component('one', root=str(one), classes=2, per_class=3, skip=1),
        Component('two', root=str(two), per_class={'train': 2}),
    ))
    # natural order (x1, x9, x10), the first two classes, the second to fourth image of each
    assert names(data) == [('one', 'train', label, f'{i}.png') for label in ('x1', 'x9') for i in (1, 2, 3)] + [
        ('two', 'train', label, f'{i}.png') for label in ('x1', 'y') for i in (0, 1)]
    assert data.targets.tolist() == [0] * 3 + [1] * 3 + [2] * 2 + [3] * 2
    assert data.component_of.tolist() == [0] * 6 + [1] * 4
    assert data.class_names == ['one/x1', 'x9', 'two/x1', 'y']


def test_train_and_validation_cut_out_of_one_split(make_folder):
    root = str(make_folder(splits=['train'], number=5) / 'train')
    part = Component('a', root=root, splits={'train': '.', 'val': '.'}, per_class={'val': 2}, skip={'train': 2})
    train, val = create_datasets(spec(part))
    assert (len(train), len(val)) == (9, 6)
    files = [{train.filename(i) for i in range(9)}, {val.filename(i) for i in range(6)}]
    assert not files[0] & files[1]
    both = create_dataset(spec(part), 'train+val')
    assert {both.filename(i) for i in range(len(both))} == files[0] | files[1]


def test_images_that_train_and_validation_share_are_told(make_folder, caplog):
    root = str(make_folder())
    with caplog.at_level(logging.WARNING):
        create_datasets(spec(Component('a', root=root)))
        assert not caplog.text
        part = Component('a', root=root, splits={'val': 'train'}, per_class={'val': 3}, skip={'train': 1})
        create_datasets(spec(part))
    assert 'train and val have 6 images in common' in caplog.text


def test_shared_and_overlapping_labels(make_folder):
    one, two = str(make_folder('one')), str(make_folder('two', classes=['a', 'b']))
    shared = create_dataset(spec(Component('one', root=one), Component('two', root=two, class_offset=0)))
    assert shared.num_classes == 3
    assert shared.class_counts().tolist() == [8, 8, 4]
    with pytest.raises(UserError, match='overlap'):
        create_dataset(spec(Component('one', root=one), Component('two', root=two, class_offset=2)))
    with pytest.raises(UserError, match='no component has class 3'):
        create_dataset(spec(Component('one', root=one), Component('two', root=two, class_offset=4)))


def test_validation_without_a_class_keeps_the_indices(make_folder, caplog):
    root = make_folder(classes=['a', 'b', 'c'])
    shutil.rmtree(root / 'val' / 'b')
    with caplog.at_level(logging.WARNING):
        _, val = create_datasets(spec(Component('images', root=str(root))))
    assert val.targets.tolist() == [0] * 4 + [2] * 4  # timm's reader alone gives 0 and 1
    assert 'no images of 1 of 3 classes (b)' in caplog.text


def test_validation_with_a_class_that_train_lacks(make_folder):
    root = make_folder()
    shutil.rmtree(root / 'train' / 'b')
    for classes in (None, 1):
        with pytest.raises(UserError, match="class 'b' that train lacks"):
            create_datasets(spec(Component('images', root=str(root), classes=classes)))


def test_empty_class_folder(make_folder):
    root = make_folder()
    for path in (root / 'val' / 'b').iterdir():
        path.unlink()
    (root / 'val' / 'b' / 'notes.txt').touch()
    with pytest.raises(UserError, match='no images in class folder .*val/b'):
        create_datasets(spec(Component('images', root=str(root))))


def test_a_class_that_skip_empties(make_folder):
    with pytest.raises(UserError, match="class 'a'.*after skip=4 of its 4"):
        create_dataset(spec(Component('images', root=str(make_folder()), skip=4)))


@pytest.mark.parametrize('name', ['val', 'eval'])
def test_split_aliases(make_folder, name):
    root = make_folder(splits=['training', name, 'test'])
    train, val, test = create_datasets(spec(Component('images', root=str(root))), ('train', 'val', 'test'))
    assert f'/{name}/' in val.filename(0) and '/training/' in train.filename(0) and '/test/' in test.filename(0)


def test_missing_split_is_not_the_whole_folder(make_folder):
    root = make_folder(splits=['train'])
    with pytest.raises(UserError, match="no folder for split 'validation'.*there: train"):
        create_datasets(spec(Component('images', root=str(root))))
    flat = root / 'train'
    assert len(create_dataset(spec(Component('images', root=str(flat))))) == 12  # as timm: no splits, all is train
    with pytest.raises(UserError, match='no split folders'):
        create_datasets(spec(Component('images', root=str(flat))))


@pytest.mark.parametrize('component, words', [
    (dict(root='/no/such/folder'), 'does not exist'),
    (dict(), 'no folder'),
    (dict(dataset='imagenet', root='/'), 'unknown dataset'),
    (dict(dataset='torch/svhn', root='/'), 'unknown dataset torch/svhn'),
    (dict(dataset='demo/faces'), 'unknown demo dataset'),
])
def test_missing_data_is_one_line(component, words):
    with pytest.raises(UserError, match=words) as error:
        create_dataset(spec(Component('x', **component)))
    assert '\n' not in str(error.value)


def test_too_many_classes_and_loose_images(make_folder, save):
    root = make_folder()
    with pytest.raises(UserError, match='classes=4, but there are only 3'):
        create_dataset(spec(Component('x', root=str(root), classes=4)))
    save(root / 'train' / 'loose.png')
    with pytest.raises(UserError, match='1 images lie directly'):
        create_dataset(spec(Component('x', root=str(root))))


def test_class_map(make_folder, tmp_path):
    root = make_folder()
    (tmp_path / 'classes.txt').write_text('c\na\n')
    data = create_dataset(spec(Component('x', root=str(root), class_map=str(tmp_path / 'classes.txt'))))
    assert data.class_names == ['c', 'a']
    assert {Path(data.filename(i)).parts[-2]: int(t) for i, t in enumerate(data.targets)} == {'c': 0, 'a': 1}


def test_names_that_differ_in_case_have_one_order(make_folder):
    root = make_folder(classes=['b', 'B', 'a', 'A'])
    if len(os.listdir(root / 'train')) < 4:
        pytest.skip('the file system ignores case')
    assert create_dataset(spec(Component('x', root=str(root)))).class_names == ['A', 'a', 'B', 'b']


def test_images_of_any_mode(tmp_path):
    folder = tmp_path / 'train' / 'a'
    folder.mkdir(parents=True)
    for i, mode in enumerate(['L', 'P', 'RGBA', 'I;16', '1', 'LA']):
        Image.new(mode, (9, 8)).save(folder / f'{i}.png')
    Image.new('CMYK', (9, 8)).save(folder / '9.jpg')
    data = create_dataset(spec(Component('x', root=str(tmp_path))))
    assert [data[i][0].mode for i in range(len(data))] == ['RGB'] * 7
    grey = create_dataset(spec(Component('x', root=str(tmp_path))), in_chans=1)
    assert grey[2][0].mode == 'L'


def test_tar_file(make_folder, tmp_path):
    import tarfile
    root = make_folder()
    for split in ('train', 'val'):
        with tarfile.open(tmp_path / f'{split}.tar', 'w') as tar:
            tar.add(root / split, arcname='.')
    shutil.rmtree(root)
    train, val = create_datasets(spec(Component('x', root=str(tmp_path))))
    assert (len(train), len(val), train.class_names) == (12, 12, ['a', 'b', 'c'])
    batches = [list(create_loader(train, 24, batch_size=5, workers=w)) for w in (0, 2)]
    assert all(torch.equal(a.input, b.input) for a, b in zip(*batches, strict=True))
