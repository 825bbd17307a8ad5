import sys

import numpy as np
import pytest

from timm_amf.data import DataSpec, create_dataset, create_datasets
from timm_amf.errors import UserError

DEMO = DataSpec.from_mapping({'preset': 'demo'})


def test_two_modes_and_thirteen_classes():
    pytest.importorskip('sklearn')
    pytest.importorskip('skimage')
    train, val, test = create_datasets(DEMO, ('train', 'val', 'test'))
    assert train.components == ['digits', 'textures']
    assert train.class_names == [str(i) for i in range(10)] + ['brick', 'grass', 'gravel']
    assert np.bincount(train.component_of).tolist() == [800, 819]
    assert np.bincount(val.component_of).tolist() == np.bincount(test.component_of).tolist() == [250, 252]
    for data in (train, val, test):
        assert all(data[i][0].size == (32, 32) and data[i][0].mode == 'RGB' for i in (0, len(data) - 1))
        assert (data.class_counts() > 0).all()
        assert data.in_memory


def test_splits_share_no_image_and_no_pixel_of_a_texture():
    pytest.importorskip('sklearn')
    skimage_data = pytest.importorskip('skimage.data')
    splits = create_datasets(DEMO, ('train', 'val', 'test'))
    seen = [{np.asarray(data[i][0]).tobytes() for i in range(len(data))} for data in splits]
    assert [len(s) for s in seen] == [1619, 502, 502]
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]

    # Replace the photographs by their row numbers: each split must keep to rows of its own.
    rows = []
    with pytest.MonkeyPatch.context() as patch:
        numbers = np.repeat(np.arange(512) // 4, 512).reshape(512, 512).astype(np.uint8)
        for name in ('brick', 'grass', 'gravel'):
            patch.setattr(skimage_data, name, lambda: numbers)
        for data in create_datasets(DEMO, ('train', 'val', 'test')):
            patches = [np.asarray(data[i][0]) for i in range(len(data)) if data.component_of[i] == 1]
            rows.append((min(p.min() for p in patches), max(p.max() for p in patches)))
    assert rows[0][1] < rows[1][0] and rows[1][1] < rows[2][0]


@pytest.mark.parametrize('module', ['sklearn.datasets', 'skimage'])
def test_without_the_extra(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r'pip install "timm_amf\[demo\]"'):
        create_dataset(DEMO)
