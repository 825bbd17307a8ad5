"""A CSV or Parquet file names the images instead of folders."""
import os
import sys

import pytest

from timm_amf import UserError
from timm_amf.data import DataSpec, create_datasets


@pytest.fixture
def table(make_folder):
    """Write a table beside a folder of images: table(rows, header) -> its path."""
    root = make_folder(classes=('a', 'b'), splits=('train', 'val'))

    def write(rows, header='path,label,split', name='t.csv', encoding='utf-8'):
        (root / name).write_text('\n'.join([header, *rows]) + '\n', encoding=encoding)
        return root / name
    return write


def spec(path, **keys):
    return DataSpec.from_mapping({'components': [{'name': 'x', 'path': str(path)}], **keys})


ROWS = ['train/a/0.png,x10,train', 'train/b/1.png,x9,training', 'val/a/0.png,x10,Validation', 'val/b/0.png,x9,val',
        'val/b/1.png,x9,test']


def test_paths_labels_and_splits(table):
    train, val, test = create_datasets(spec(table(ROWS, encoding='utf-8-sig')), ('train', 'val', 'test'))
    assert train.class_names == val.class_names == ['x9', 'x10']  # natural order
    assert train.targets.tolist() == [1, 0] and val.targets.tolist() == [1, 0] and test.targets.tolist() == [0]
    assert train.filename(1).endswith(os.path.join('train', 'b', '1.png'))
    assert train[0][0].size == (40, 30)


@pytest.mark.parametrize('header', ['file,class', 'Filename, Class', 'image,label'])
def test_names_of_columns_and_absolute_paths(table, tmp_path, header):
    folder = tmp_path / 'images' / 'train'
    rows = [f'{folder}/{label}/{i}.png,{label}' for label in 'ab' for i in range(4)]
    train, val = create_datasets(spec(table(rows, header), val_share=0.25))
    assert train.class_counts().tolist() == [3, 3] and val.class_counts().tolist() == [1, 1]


@pytest.mark.parametrize('rows, header, match', [
    (ROWS, 'path,klass,split', r'no column label or class \(there: path, klass, split\)'),
    (ROWS, 'where,label,split', 'no column path or file or filename or image'),
    ([*ROWS, 'train/a/1.png,,train'], 'path,label,split', '1 rows without a label, the first is row 6'),
    ([*ROWS, 'train/a/9.png,x9,train'], 'path,label,split', r'1 of 3 images are not there, the first is .*9\.png'),
    ([*ROWS, 'train/a/1.png,x9,fold1'], 'path,label,split', "row 6: unknown split 'fold1'"),
    ([*ROWS, ROWS[0]], 'path,label,split', '2 rows name .*0.png'),
    (ROWS[:2], 'path,label,split', "no rows of split 'validation' .*--val-share"),
    (['train/a/0.png,x'], 'path,label', 'has no column split, so all is train.*--val-share'),
    (['train/a/0.png,x,y,train'], 'path,label,split', 'row 1 has 4 fields'),
    ([], 'path,label', 'no rows'),
])
def test_one_line_errors(table, rows, header, match):
    with pytest.raises(UserError, match=match) as error:
        create_datasets(spec(table(rows, header)))
    assert '\n' not in str(error.value) and 't.csv' in str(error.value)


def test_a_table_that_is_not_there_or_no_text(tmp_path):
    with pytest.raises(UserError, match='No such file'):
        create_datasets(spec(tmp_path / 'none.csv'))
    (tmp_path / 't.csv').write_bytes(b'path,label\n\xff,1\n')
    with pytest.raises(UserError, match='is not UTF-8 .*save it as UTF-8'):
        create_datasets(spec(tmp_path / 't.csv'))


def test_parquet_needs_a_package(table, monkeypatch):
    for name in ('pyarrow', 'pandas'):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match='pip install pyarrow'):
        create_datasets(spec(table([], name='t.parquet')))


def test_parquet(table):
    arrow, parquet = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    path = table([], name='t.parquet')
    columns = dict(zip(('path', 'label', 'split'), zip(*(row.split(',') for row in ROWS))))
    parquet.write_table(arrow.table({name: list(values) for name, values in columns.items()}), path)
    train, val = create_datasets(spec(path))
    assert train.class_names == ['x9', 'x10'] and len(train) == len(val) == 2
