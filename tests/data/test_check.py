import os

import pytest
from PIL import Image

from timm_amf.data import Component, DataSpec, build_cache, check_images, create_dataset
from timm_amf.data import check as check_module
from timm_amf.errors import UserError


@pytest.fixture
def damaged(make_folder, save):
    """A folder in which images are bad in all the ways that images are, and good in some that look bad."""
    root = make_folder(suffix='jpg', number=6, size=(90, 70)) / 'train'
    content = (root / 'a' / '0.jpg').read_bytes()
    (root / 'a' / '0.jpg').write_bytes(content[:len(content) // 2])  # truncated
    (root / 'a' / '1.jpg').write_bytes(b'')
    (root / 'b' / '1.jpg').write_bytes(b'<html>not found</html>')
    (root / 'b' / '2.jpg').unlink()
    (root / 'b' / '2.jpg').symlink_to(root / 'nowhere.jpg')
    png = root / 'c' / 'x.png'
    save(png, (50, 40))
    png.write_bytes(png.read_bytes()[:-40])
    for i, mode in enumerate(('P', 'RGBA', 'I;16', 'LA')):
        Image.new(mode, (9, 8)).save(root / 'c' / f'good{i}.png')
    Image.new('CMYK', (9, 8)).save(root / 'c' / 'good.jpg')
    (root / 'c' / '0.jpg').write_bytes((root / 'c' / '1.jpg').read_bytes() + b'some bytes too many')
    return root


BAD = {'a/0.jpg', 'a/1.jpg', 'b/1.jpg', 'b/2.jpg', 'c/x.png'}


def open_folder(root):
    return create_dataset(DataSpec((Component('x', root=str(root)),)))


def short(path):
    return '/'.join(path.split('/')[-2:])


def test_bad_images_stop_before_training(damaged, tmp_path):
    with pytest.raises(UserError, match='5 of 24 images cannot be read.*--skip-bad-images') as error:
        check_images(open_folder(damaged), cache_dir=tmp_path / 'cache', workers=1)
    assert all(name in str(error.value) for name in BAD)
    assert '\n' not in str(error.value)


def test_skipping_goes_on_without_them(damaged, tmp_path, caplog):
    data = open_folder(damaged)
    bad = check_images(data, skip_bad=True, cache_dir=tmp_path / 'cache')
    assert len(bad) == 5 and dict(bad)[str(damaged / 'b' / '2.jpg')] == 'no such file'
    assert len(data) == 19
    assert not BAD & {short(data.filename(i)) for i in range(19)}
    assert data.class_names == ['a', 'b', 'c'] and data.class_counts().tolist() == [4, 4, 11]
    assert all(data[i][1] == 'abc'.index(data.filename(i).split('/')[-2]) for i in range(19))
    assert '5 of 24 images cannot be read' in caplog.text


def test_a_class_with_no_other_images_is_an_error(damaged, tmp_path):
    for i in range(6):
        (damaged / 'a' / f'{i}.jpg').write_bytes(b'')
    with pytest.raises(UserError, match="class 'a' has no image that can be read"):
        check_images(open_folder(damaged), skip_bad=True, cache_dir=tmp_path / 'cache')


def test_what_was_found_is_remembered_until_a_file_changes(damaged, tmp_path, monkeypatch):
    first = check_images(open_folder(damaged), True, tmp_path / 'cache')
    with monkeypatch.context() as patch:
        patch.setattr(check_module, '_read', lambda *args: pytest.fail('checked again'))
        assert check_images(open_folder(damaged), True, tmp_path / 'cache') == first
    (damaged / 'a' / '0.jpg').write_bytes((damaged / 'a' / '2.jpg').read_bytes())
    assert len(check_images(open_folder(damaged), True, tmp_path / 'cache')) == 4


def test_it_works_where_nothing_can_be_remembered(damaged, tmp_path, caplog):
    (tmp_path / 'file').touch()
    bad = check_images(open_folder(damaged), skip_bad=True, cache_dir=tmp_path / 'file' / 'cache')
    assert len(bad) == 5
    assert 'not remembered' in caplog.text


def test_good_images_and_images_in_memory(make_folder, tmp_path):
    assert check_images(open_folder(make_folder()), cache_dir=tmp_path / 'cache') == []
    pytest.importorskip('sklearn')
    pytest.importorskip('skimage')
    demo = create_dataset(DataSpec.from_mapping({'preset': 'demo'}))
    assert check_images(demo, cache_dir=tmp_path / 'other') == []
    assert build_cache(demo, 32, tmp_path / 'other') is None and demo.cache is None
    assert not os.path.exists(tmp_path / 'other')


@pytest.mark.timeout(60)
def test_what_reading_would_wait_for_or_does_not_know(make_folder, tmp_path):
    """A pipe without a writer, and pixels of an unknown range, which only the conversion refuses."""
    root = make_folder(number=3)
    os.mkfifo(root / 'train' / 'a' / 'x.png')
    Image.new('F', (4, 4)).save(root / 'train' / 'b' / 'x.png', 'TIFF')
    data = open_folder(root)
    reasons = dict(check_images(data, True, tmp_path / 'cache'))
    assert reasons[str(root / 'train' / 'a' / 'x.png')] == 'no file'
    assert 'floating point' in reasons[str(root / 'train' / 'b' / 'x.png')]


def test_copies_in_other_splits_are_counted(make_folder, tmp_path):
    root = make_folder(number=3, size=(200, 150))
    for label, index in (('a', 0), ('b', 1), ('c', 2)):  # the images of the two splits are the same ones
        for i in range(3):
            if i != index:
                Image.effect_noise((200, 150), 90 + 7 * i + ord(label)).save(root / 'val' / label / f'{i}.png')
    Image.open(root / 'train' / 'b' / '1.png').resize((120, 90)).save(root / 'val' / 'b' / '1.png')
    for name in ('train', 'val'):  # without structure, nothing looks the same
        Image.new('RGB', (20, 20), (len(name), 0, 0)).save(root / name / 'a' / 'flat.png')

    def checked(skip=False):
        spec = DataSpec((Component('x', root=str(root)),))
        parts = [create_dataset(spec, name) for name in ('train', 'val')]
        for part in parts:
            check_images(part, skip, cache_dir=tmp_path / 'cache')
        return check_module.find_copies(parts[0], {'val': parts[1]})

    assert 'val has copies of training images (2) and images that look like one of training (1)' in checked()
    assert checked() == checked() != ''  # remembered
    assert f'{root}/val/a/0.png and {root}/train/a/0.png' in checked()
    (root / 'train' / 'a' / '1.png').write_bytes(b'')
    assert 'val has copies of training images (2)' in checked(skip=True)
    for path in (root / 'val').glob('*/[0-2].png'):
        Image.effect_noise((200, 150), 200).save(path)
    assert checked(skip=True) == ''
