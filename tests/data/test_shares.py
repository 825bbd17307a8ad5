"""Splits that are drawn: they part the training images, groups stay whole, and a run's file keeps them."""
import logging

import pytest

from timm_amf import UserError
from timm_amf.data import DataSpec, create_dataset, create_datasets
from timm_amf.data.shares import write_splits

ROLES = ('train', 'val', 'test')


def spec(root, **keys):
    return DataSpec.from_mapping({'components': [{'name': 'x', 'path': str(root)}], **keys})


def names(data):
    return {'/'.join(data.filename(i).split('/')[-2:]) for i in range(len(data))}


@pytest.fixture
def plain(make_folder):
    return make_folder(classes=('a', 'b'), splits=('.',), number=20)


def test_three_splits_part_the_images(plain):
    keys = dict(val_share=0.2, test_share=0.25)
    parts = create_datasets(spec(plain, **keys), ROLES)
    assert [part.class_counts().tolist() for part in parts] == [[11, 11], [4, 4], [5, 5]]
    assert len(set().union(*map(names, parts))) == 40
    # The validation images are those of --val-share alone, and a split opened by itself is the same.
    assert names(parts[1]) == names(create_dataset(spec(plain, val_share=0.2), 'val'))
    assert names(parts[2]) == names(create_dataset(spec(plain, **keys), 'test'))


def test_a_test_share_beside_a_validation_folder(make_folder):
    train, val, test = create_datasets(spec(make_folder(number=10), test_share=0.2), ROLES)
    assert train.class_counts().tolist() == [8] * 3 and test.class_counts().tolist() == [2] * 3
    assert val.filename(0).split('/')[-3] == 'val' and len(val) == 30


def test_a_folder_that_a_share_replaces_is_told(make_folder, caplog):
    with caplog.at_level(logging.WARNING):
        create_datasets(spec(make_folder(number=10), val_share=0.2))
    assert '/val is left out: --val-share draws val from the training images' in caplog.text


def test_what_is_wrong_with_the_training_images_is_told_of_a_share_of_them(plain):
    (plain / 'empty').mkdir()
    with pytest.raises(UserError, match="no images in class folder '.*empty'"):
        create_dataset(spec(plain, val_share=0.2), 'val')


def test_groups_that_leave_nothing_are_refused(plain):
    """Each class one group: training keeps it, and nothing would validate."""
    with pytest.raises(UserError, match='no image is left for val.*make smaller groups'):
        create_datasets(spec(plain, val_share=0.2, group='^([ab])/'))


def test_limits_of_the_training_images_hold_for_what_is_drawn(plain):
    data = spec(plain, val_share=0.5).to_mapping()
    data['components'][0]['per_class'] = {'train': 10}
    train, val = create_datasets(DataSpec.from_mapping(data))
    assert not names(train) & names(val) and len(train) == len(val) == 10


@pytest.mark.parametrize('keys, match', [
    (dict(val_share=0.5, test_share=0.5), 'together they must be below 1'),
    (dict(test_share=1.5), 'test_share must be between 0 and 1'),
    (dict(group='(a)'), 'no effect without --val-share'), (dict(group='(', val_share=.1), 'no regular expression'),
    (dict(group='patient', val_share=.1), 'is no column of a table .*one group'),
])
def test_shares_and_groups_that_are_none(plain, keys, match):
    with pytest.raises(UserError, match=match):
        create_datasets(spec(plain, **keys))


# -- groups -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def clips(make_folder):
    """Two classes of 10 clips of 4 frames, one clip in both, and an image of no clip."""
    root = make_folder(classes=('a', 'b'), splits=('.',), number=41)
    for label, first in (('a', 0), ('b', 9)):
        for i in range(40):
            (root / label / f'{i}.png').rename(root / label / f'clip{first + i // 4}_{i}.png')
    return root


def test_groups_stay_whole(clips, caplog):
    keys = dict(val_share=0.2, test_share=0.2, group=r'(clip\d+)_')
    parts = create_datasets(spec(clips, **keys), ROLES)
    groups = [{name.split('/')[1].split('_')[0] for name in names(part) if '_' in name} for part in parts]
    assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]
    assert sum(map(len, parts)) == 82
    for part in parts[1:]:
        assert all(6 <= count <= 10 for count in part.class_counts())
    assert caplog.text.count('2 of 82 images have no --group') == 1
    assert [names(p) for p in create_datasets(spec(clips, **keys), ROLES)] == [names(p) for p in parts]


def test_few_large_groups(clips):
    """A share smaller than half of any group still gets one of each class, and leaves one."""
    for i in range(41):
        for path in [*clips.glob(f'*/clip*_{i}.png'), *clips.glob('*/40.png')]:
            path.rename(path.with_name(f'{path.parent.name}{i % 3}_{i}.png'))
    train, val = create_datasets(spec(clips, val_share=0.05, group='([ab][0-9])_'))
    assert all(val.class_counts() > 0) and all(train.class_counts() > 0)
    assert not {n[:4] for n in names(train)} & {n[:4] for n in names(val)}


def test_a_column_is_a_group(clips):
    rows = [f'{path},{path.parent.name},p{i % 7}' for i, path in enumerate(sorted(clips.glob('*/*.png')))]
    (clips / 't.csv').write_text('\n'.join(['path,label,Patient', *rows]))
    train, val = create_datasets(spec(clips / 't.csv', val_share=0.3, group='Patient'))
    patient = dict(row.split(',')[::2] for row in rows)
    sides = [{patient[part.filename(i)] for i in range(len(part))} for part in (train, val)]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 7


# -- split.csv --------------------------------------------------------------------------------------------------------


def test_the_file_keeps_what_was_drawn(plain, save, tmp_path, caplog):
    from dataclasses import replace
    drawn = spec(plain, val_share=0.2, test_share=0.2)
    parts = create_datasets(drawn, ROLES)
    write_splits(tmp_path / 'split.csv', parts[0].drawn)
    lines = (tmp_path / 'split.csv').read_text().splitlines()
    assert lines[0] == 'split,path,label' and len(lines) == 41
    assert lines[1].startswith('train,a/') and lines[1].endswith('png,a')
    for i in range(30):
        save(plain / 'a' / f'new{i}.png', seed=i)
    plain.rename(tmp_path / 'moved')
    moved = replace(drawn, components=spec(tmp_path / 'moved').components)
    kept = replace(moved, split_file=str(tmp_path / 'split.csv'))
    assert [names(p) for p in create_datasets(kept, ROLES)] == [names(p) for p in parts]
    assert names(create_dataset(moved, 'val')) != names(parts[1])
    next((tmp_path / 'moved' / 'b').glob('*.png')).unlink()
    caplog.set_level(logging.WARNING)
    create_datasets(kept, ROLES)
    assert '1 of its 40 images' in caplog.text
    with pytest.raises(UserError, match='none of its 40 images .* or a copy of it'):
        (tmp_path / 'other' / 'a').mkdir(parents=True)
        save(tmp_path / 'other' / 'a' / 'z.png')
        create_datasets(replace(kept, components=spec(tmp_path / 'other').components), ROLES)


def test_components_of_equal_paths(make_folder, tmp_path):
    from dataclasses import replace
    roots = [make_folder(name, classes=('a', 'b'), splits=('.',), number=9) for name in ('one', 'two')]
    data = DataSpec.from_mapping({'components': list(map(str, roots)), 'val_share': 0.3})
    train, val = create_datasets(data)
    write_splits(tmp_path / 'split.csv', train.drawn)
    again = create_datasets(replace(data, split_file=str(tmp_path / 'split.csv')))
    for one, two in zip((train, val), again):
        assert [one.filename(i) for i in range(len(one))] == [two.filename(i) for i in range(len(two))]


def test_the_file_beside_the_images_is_a_table_of_them(plain):
    drawn = create_datasets(spec(plain, val_share=0.2, test_share=0.2), ROLES)
    write_splits(plain / 'split.csv', drawn[0].drawn)
    listed = create_datasets(spec(plain / 'split.csv'), ROLES)
    assert [names(part) for part in listed] == [names(part) for part in drawn]
    assert listed[0].class_names == drawn[0].class_names
