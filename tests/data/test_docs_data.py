"""The examples of docs/data.md are run, or read, as they stand."""
import re
from pathlib import Path

import pytest
import yaml

from timm_amf.data import DataSpec, data_spec_from_args, list_presets
from timm_amf.engine.options import parse_args

PAGE = (Path(__file__).parents[2] / 'docs' / 'data.md').read_text(encoding='utf-8')


def blocks(language):
    return re.findall(rf'```{language}\n(.*?)```', PAGE, re.DOTALL)


def test_python():
    pytest.importorskip('sklearn')
    pytest.importorskip('skimage')
    code, = blocks('python')
    exec(compile(code, 'docs/data.md', 'exec'), {'__name__': '__main__'})


@pytest.mark.parametrize('text', blocks('yaml'))
def test_yaml(text):
    assert DataSpec.from_mapping(yaml.safe_load(text)['data']).components


@pytest.mark.parametrize('text', blocks('bash'))
def test_flags(text, tmp_path):
    words = text.replace('\\\n', ' ').replace('/data/pets', str(tmp_path)).split()
    assert words[:2] == ['timm-amf', 'train']
    assert data_spec_from_args(parse_args([*words[2:], '--output', str(tmp_path)])).components


def test_every_preset_is_named():
    assert all(f'| `{name}` |' in PAGE for name in list_presets())
