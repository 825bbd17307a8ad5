"""What a folder holds is read as its owner sees it: nothing dropped, merged or invented without a word."""
import unicodedata

import numpy as np
import pytest
from PIL import Image

from timm_amf import UserError
from timm_amf.data import DataSpec, create_dataset, create_datasets
from timm_amf.data.datasets import lacks_split
from timm_amf.data.sources import as_shown


def spec(root, **component):
    return DataSpec.from_mapping({'components': [{'name': 'x', 'path': str(root), **component}]})


@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_orientation(orientation, tmp_path):
    """The inverse of each of the eight orientations is written; what is read is what a viewer shows."""
    shown = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8))
    stored = {
        1: [], 2: ['FLIP_LEFT_RIGHT'], 3: ['ROTATE_180'], 4: ['FLIP_TOP_BOTTOM'], 5: ['TRANSPOSE'], 6: ['ROTATE_90'],
        7: ['TRANSVERSE'], 8: ['ROTATE_270']}[orientation]
    image = shown
    for name in stored:
        image = image.transpose(Image.Transpose[name])
    exif = Image.Exif()
    exif[274] = orientation
    image.save(tmp_path / 'a.png', exif=exif)
    assert np.array_equal(as_shown(Image.open(tmp_path / 'a.png'), 'RGB'), shown)


@pytest.mark.parametrize('mode', ['RGB', 'L', None])
@pytest.mark.parametrize('suffix', ['png', 'tif'])
def test_sixteen_bits_keep_their_greys(tmp_path, suffix, mode):
    values = np.random.default_rng(0).integers(0, 65536, (5, 7), dtype=np.uint16)
    values[0, 0] = 65535
    Image.fromarray(values).save(tmp_path / f'a.{suffix}')
    read = np.asarray(as_shown(Image.open(tmp_path / f'a.{suffix}'), mode))
    assert read.dtype == np.uint8
    assert np.array_equal(read if read.ndim == 2 else read[..., 1], values >> 8)


@pytest.mark.parametrize('values', [np.full((2, 2), 70000, np.int32), np.full((2, 2), 0.5, np.float32)])
def test_pixels_of_unknown_range_are_refused(tmp_path, values):
    Image.fromarray(values).save(tmp_path / 'a.tif')
    with pytest.raises(OSError, match='convert it to 8 or 16'):
        as_shown(Image.open(tmp_path / 'a.tif'), 'RGB')


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'P'])
def test_transparency_is_over_white(mode):
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[1, 1, 3], rgba[2, 2, 3] = 255, 128
    image = Image.fromarray(rgba)
    if mode == 'P':
        image = Image.new('P', (4, 4), 0)
        image.putpalette([0, 0, 0, 10, 10, 10])
        image.putpixel((1, 1), 1)
        image.info['transparency'] = 0
        expected = {(0, 0): 255, (1, 1): 10}
    else:
        image = image.convert(mode)
        expected = {(0, 0): 255, (1, 1): 0, (2, 2): 127}
    for wanted in ('RGB', 'L'):
        read = as_shown(image, wanted)
        for place, value in expected.items():
            assert abs(np.ravel(read.getpixel(place))[0] - value) <= 1
    if mode == 'RGBA':  # who asks for the channel gets it
        assert np.array_equal(as_shown(image, 'RGBA'), rgba)


def test_what_is_left_out_is_counted(make_folder, save, caplog):
    root = make_folder(classes=('cat', 'dog'))
    save(root / 'train' / '.ipynb_checkpoints' / '0.png')
    save(root / 'train' / 'cat' / '.thumbs' / '0.png')
    save(root / 'train' / '__MACOSX' / 'cat' / '0.png')
    save(root / 'train' / 'dog' / '._0.png')
    for i in range(3):
        save(root / 'train' / 'cat' / f'{i}.webp')
    (root / 'train' / 'notes.txt').touch()
    data = create_dataset(spec(root))
    assert data.class_names == ['cat', 'dog'] and len(data) == 8
    text = caplog.text
    assert '3 hidden folders' in text and '3 .webp' in text and '1 .txt' in text and '1 hidden files' in text
    assert len(create_dataset(spec(root, input_key='.png;.webp'))) == 11


def test_nested_folders(make_folder, save, caplog):
    """The last folder is the class, as in timm, and it is said; what would merge or is both is refused."""
    root = make_folder(classes=('animals/cat', 'things/cup'))
    assert create_dataset(spec(root)).class_names == ['cat', 'cup'] and 'name of the last folder' in caplog.text
    save(root / 'train' / 'things' / 'cat' / '0.png')
    with pytest.raises(UserError, match=r'animals.cat and .*things.cat are two classes of one name'):
        create_dataset(spec(root))
    (root / 'train' / 'things' / 'cat').rename(root / 'train' / 'things' / 'cup' / 'mug')
    with pytest.raises(UserError, match='cup holds images and, in .*mug, a class of its own'):
        create_dataset(spec(root))


def test_unicode_forms_are_one_name(make_folder, save):
    composed, decomposed = (unicodedata.normalize(form, 'café') for form in ('NFC', 'NFD'))
    root = make_folder(classes=('tea',))
    save(root / 'train' / composed / '0.png')
    save(root / 'val' / decomposed / '0.png')
    train, val = create_datasets(spec(root))
    assert train.class_names == val.class_names == [composed, 'tea'] and val.class_counts().tolist() == [1, 4]


# -- labels by name ---------------------------------------------------------------------------------------------------


def test_labels_follow_the_names_of_a_model(make_folder, caplog):
    root = make_folder(classes=('c', 'b'), splits=('test',))
    data = create_dataset(spec(root), 'test', class_names=['b', 'x', 'c', 'y'])
    assert data.class_names == ['b', 'x', 'c', 'y'] and data.class_counts().tolist() == [4, 0, 4, 0]
    assert "2 of the 4 classes of the model are not there (x, y)" in caplog.text


def test_a_class_that_a_model_does_not_know_is_named(make_folder):
    root = make_folder(classes=('b', 'renamed', 'z'), splits=('test',))
    with pytest.raises(UserError, match=r"class 'renamed' \(and 1 more\) is not among the 2 classes of the model"):
        create_dataset(spec(root), 'test', class_names=['b', 'c'])


def test_names_that_components_share_keep_their_component(make_folder, tmp_path):
    one, two = make_folder('one', classes=('a', 'b')), make_folder('two', classes=('b', 'c'))
    both = DataSpec.from_mapping({'components': [{'name': 'one', 'path': str(one)}, {'name': 'two', 'path': str(two)}]})
    names = create_dataset(both).class_names
    assert names == ['a', 'one/b', 'two/b', 'c']
    # One component alone has no need of the prefix, and is known by it all the same.
    alone = DataSpec.from_mapping({'components': [{'name': 'two', 'path': str(two)}]})
    data = create_dataset(alone, 'val', class_names=names)
    assert data.class_counts().tolist() == [0, 0, 4, 4]


# -- a folder without splits ------------------------------------------------------------------------------------------


def test_a_share_of_the_training_images_validates(make_folder, tmp_path):
    root = make_folder(classes=('a', 'b'), splits=('.',), number=10)
    (root / 'c').mkdir()
    (root / 'a' / '0.png').rename(root / 'c' / '0.png')  # a class of one image trains
    data = {'components': [{'name': 'x', 'path': str(root)}], 'val_share': 0.2}
    train, val = create_datasets(DataSpec.from_mapping(data))
    assert train.class_counts().tolist() == [7, 8, 1] and val.class_counts().tolist() == [2, 2, 0]
    assert train.count_shared(val) == 0
    names = {val.filename(i)[-7:] for i in range(len(val))}
    root.rename(tmp_path / 'moved')
    data['components'][0]['path'] = str(tmp_path / 'moved')
    moved = create_dataset(DataSpec.from_mapping(data), 'val')
    assert {moved.filename(i)[-7:] for i in range(len(moved))} == names
    # One image more in a class changes at most one of its others.
    (tmp_path / 'moved' / 'b' / '0.png').with_name('new.png').write_bytes(
        (tmp_path / 'moved' / 'b' / '0.png').read_bytes())
    more = create_dataset(DataSpec.from_mapping(data), 'val')
    assert len({more.filename(i)[-7:] for i in range(len(more))} ^ names) <= 2


@pytest.mark.parametrize('share', [1, -0.1, 'a'])
def test_a_share_that_is_none(share):
    with pytest.raises(UserError, match='val_share (must be|1 and)'):
        DataSpec.from_mapping({'path': 'x', 'val_share': share})


def test_what_lacks_a_split(make_folder, tmp_path):
    """A folder by any of timm's names, a tar file, and a column of a table say which images are of a split."""
    plain = make_folder('plain', splits=('train',))
    assert lacks_split(str(plain), 'val') and not lacks_split(str(plain), 'train')
    (plain / 'eval.tar').touch()
    assert not lacks_split(str(plain), 'val')
    assert not lacks_split(str(make_folder('both', splits=('train', 'validation'))), 'val')
    assert not lacks_split(str(tmp_path / 'gone'), 'val')  # there is nothing to draw from
    for header, lacks in (('path,label', True), ('path,label,split', False)):
        (tmp_path / 't.csv').write_text(header)
        assert lacks_split(str(tmp_path / 't.csv'), 'val') == lacks


def test_a_folder_of_data_sets_is_none(make_folder, tmp_path):
    one, _ = make_folder('sets/one', splits=('train', 'val')), make_folder('sets/two', classes=('x', 'y'))
    with pytest.raises(UserError, match=rf'sets holds 2 data sets .* such as {one}, or mix them, .*--component'):
        create_dataset(spec(tmp_path / 'sets'))
