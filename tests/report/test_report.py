"""A report: what its page and files promise, and the mistakes that it tells in one line."""
import csv
import importlib.util
import io
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

pytest.importorskip('matplotlib')
pytest.importorskip('jinja2')

from timm_amf import figures
from timm_amf.cli import main
from timm_amf.engine.evaluation import Evaluation
from timm_amf.models.charts import Chart, Seen, route_charts, weight_charts
from timm_amf.report import content

_spec = importlib.util.spec_from_file_location(
    'conftest_inference', Path(__file__).parents[1] / 'inference' / 'conftest.py')
_shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_shared)
folders, runs = _shared.folders, _shared.runs


class Page(HTMLParser):
    """Tags with their attributes, and the words of the page."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    def of(self, *names):
        return [attrs for tag, attrs in self.tags if tag in names]

    @property
    def text(self):
        return ' '.join(self.words)


def check_page(path) -> Page:
    """What holds for any report."""
    page = Page(path)
    for tag, attrs in page.tags:
        for name in ('src', 'href', 'xlink:href', 'data', 'action'):
            target = attrs.get(name, '#')
            local = target.startswith(('#', 'data:image/')) or (path.parent / target).is_file()
            assert local, (tag, target)
    assert not page.of('script', 'link', 'iframe') and '@import' not in page.text
    ids = [attrs['id'] for _, attrs in page.tags if 'id' in attrs]
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:url\(#|href="#)([^")]+)', path.read_text(encoding='utf-8'))
    assert used and set(used) <= set(ids)
    assert all(attrs.get('alt') for attrs in page.of('img'))
    assert all(attrs['role'] == 'img' and attrs['aria-label'] for attrs in page.of('svg'))
    tables = len(page.of('table'))
    assert tables == len(page.of('caption')) > 0 and len(page.of('figcaption')) == len(page.of('figure')) > 0
    assert all(attrs['scope'] in ('col', 'row') for attrs in page.of('th'))
    for attrs in page.of('figure'):
        png = Image.open(path.parent / f'{attrs["id"]}.png')
        assert png.format == 'PNG' and min(png.size) > 50 and np.ptp(np.asarray(png.convert('L'))) > 50
        with open(path.parent / f'{attrs["id"]}.csv', newline='', encoding='utf-8') as file:
            assert len(list(csv.reader(file))) > 1
    return page


@pytest.mark.parametrize('kind, own', [
    ('plain', set()),
    ('amf', {'weights', 'assignment', 'weights_by_component', 'images_by_branch', 'weighted_features'}),
    ('spottune', {'tuned_blocks', 'blocks', 'images_by_tuned_blocks', 'images_by_route'}),
])
def test_report_of_a_run(runs, kind, own, tmp_path, capsys):  # noqa: F811
    assert main(['report', str(runs[kind]), '--cpu', '--output', str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / 'index.html')
    page = check_page(tmp_path / 'index.html')
    found = {attrs['id'] for attrs in page.of('figure')}
    common = {'loss', 'accuracy', 'components', 'lr', 'speed', 'confusion', 'classes', 'reliability', 'features'}
    assert common | own <= found and not (found - common - own - {'worst_confusions', 'errors'})
    for words in ('of training steps', 'torch', 'What trains', '15', 'stripes'):
        assert words in page.text
    with open(runs[kind] / 'summary.csv', newline='') as one, open(tmp_path / 'loss.csv', newline='') as two:
        summary, drawn = list(csv.DictReader(one)), list(csv.DictReader(two))
    assert [float(row['train_loss']) for row in summary] == [float(row['train_loss']) for row in drawn]
    # As what a run prints, from 1; its files count from 0, as timm's.
    assert [row['epoch'] for row in summary] == ['0', '1'] and [row['epoch'] for row in drawn] == ['1.0', '2.0']


def test_report_of_several_runs_and_without_images(runs, folders, tmp_path):  # noqa: F811
    three = [str(runs[kind]) for kind in ('plain', 'amf', 'spottune')]
    assert main(['report', *three, '--cpu', '--output', str(tmp_path / 'all')]) == 0
    page = check_page(tmp_path / 'all' / 'index.html')
    assert {attrs['id'] for attrs in page.of('figure')} >= {'train_loss', 'eval_loss', 'eval_top1'}
    assert f'{three[1]} less {three[0]}' in page.text
    assert 'mean of' not in page.text and f'No mean: {three[0]} and {three[1]} differ in their' in page.text
    # Images are gone, and not needed.
    moved = tmp_path / 'moved'
    shutil.copytree(runs['amf'], moved)
    options = (moved / 'args.yaml').read_text()
    (moved / 'args.yaml').write_text(options.replace(str(folders), str(tmp_path / 'gone')))
    assert main(['report', str(moved), '--no-eval', '--cpu']) == 0
    found = {attrs['id'] for attrs in check_page(moved / 'report' / 'index.html').of('figure')}
    assert {'loss', 'weights', 'assignment'} <= found and 'confusion' not in found


def test_differences_are_paired():
    one, two = evaluation(3, 60, 0), evaluation(3, 60, 1)
    two = replace(two, run='other', targets=one.targets, paths=one.paths)
    table = content.differences([one, two])
    d = 100. * (two.hit.astype(float) - one.hit)
    assert table.rows[0][1] == f'{d.mean():+.2f}'
    from scipy import stats

    low, high = stats.t.interval(0.95, len(d) - 1, d.mean(), stats.sem(d))
    assert table.rows[0][2] == f'{low:+.2f} to {high:+.2f}'


# -- mistakes ---------------------------------------------------------------------------------------------------------


def test_mistakes_are_one_line(runs, tmp_path, capsys, monkeypatch):  # noqa: F811
    def told(*words):
        capsys.readouterr()
        assert main(['report', *map(str, words), '--cpu']) == 2
        text, = capsys.readouterr().err.splitlines()
        return text

    assert 'give the folder of a run' in told(tmp_path)
    assert 'given twice' in told(runs['plain'], runs['plain'])
    broken = tmp_path / 'broken'
    shutil.copytree(runs['plain'], broken)
    whole = (broken / 'summary.csv').read_text()
    (broken / 'summary.csv').write_text(whole.replace('eval_loss', 'something'))
    assert "no column 'eval_loss'" in told(broken)
    (broken / 'summary.csv').write_text(whole + 'x,y\n')
    assert 'damaged' in told(broken)
    (broken / 'summary.csv').write_text(whole)
    assert '/x: cannot be written (Not a directory); choose another --output' in told(
        broken, '--output', f'{__file__}/x')
    with FileLock(broken / '.lock'):
        assert 'a run is writing there' in told(broken)
    (broken / 'plan.yaml').write_text('')
    assert 'plan.yaml: must hold keys and values' in told(broken)
    (broken / 'plan.yaml').unlink()
    assert 'older version' in told(broken)
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    assert "pip install 'timm_amf[report]'" in told(runs['plain'])


# -- figures ----------------------------------------------------------------------------------------------------------


def evaluation(classes: int, images: int, seed: int = 0) -> Evaluation:
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, classes, images)
    logits = rng.normal(size=(images, classes))
    logits[np.arange(images), targets] += 2
    log_probs = (logits - np.log(np.exp(logits).sum(1, keepdims=True))).astype(np.float32)
    names = [f'a_class_of_number_{i:03d}$' for i in range(classes)]
    return Evaluation(
        'run', names, ['a'], [f'{i}.jpg' for i in range(images)], targets, np.zeros(images, dtype=int), log_probs)


def charts(found: Evaluation) -> list[Chart]:
    confidence = np.exp(found.log_probs.max(1))
    texts = [f'image {i}' for i in range(len(found.paths))]
    own = route_charts(Seen({}, ['a'], found.component_of, (found.log_probs[:, :1] > -1).repeat(6, 1), texts))
    parts = [*content._confusions(found, found.class_names, confidence, texts), *content._classes(found), *own]
    return [part for part in parts if isinstance(part, Chart)]


def thumbnail(index):
    return Image.new('RGB', (20, 10), (index % 255, 0, 0))


@pytest.mark.parametrize('classes, images', [(1, 1), (2, 9), (200, 500)])
def test_labels_do_not_overlap(classes, images):
    for chart in charts(evaluation(classes, images)):
        figure = figures.draw(chart, thumbnail)
        for axes in figure.axes if chart.kind in ('heat', 'bars', 'columns') else ():
            for axis in (axes.xaxis, axes.yaxis):
                labels = [t.get_window_extent() for t in axis.get_ticklabels() if t.get_text()]
                assert labels
                for one, two in zip(labels, labels[1:]):
                    assert not one.overlaps(two), (chart.name, one, two)
        assert figures.png(figure) and figures.svg(figure, chart.name, chart.title).count('<svg') == 1


def test_long_names_of_runs_differ_in_a_legend():
    names = [f'runs/textures_tf_efficientnet_lite0_norms-frozen_seed{i}' for i in (42, 43)]
    chart = Chart('loss', 'Loss', '', 'lines', {'epoch': [1, 2], names[0]: [1., 2.], names[1]: [2., 3.]})
    texts = [text.get_text() for text in figures.draw(chart, thumbnail).legends[0].texts]
    assert texts == [f'runs/textures…-frozen_seed{i}' for i in (42, 43)]


def test_csv_is_what_is_drawn():
    found = evaluation(5, 80)
    confusion, *_, classes = [c for c in charts(found) if c.name in ('confusion', 'classes')]
    head, *rows = csv.reader(io.StringIO(figures.table_csv(confusion)))
    assert head[1:] == found.class_names and [[int(v) for v in row[1:]] for row in rows] == found.confusion().tolist()
    axes = figures.draw(confusion, thumbnail).axes[0]
    assert [t.get_text() for t in axes.texts] == [f'{v}' for v in found.confusion().ravel() if v]
    rows = list(csv.DictReader(io.StringIO(figures.table_csv(classes))))
    widths = [bar.get_width() for bar in figures.draw(classes, thumbnail).axes[0].patches]
    assert [float(row['accuracy']) for row in rows] == pytest.approx(widths)
    lines = Chart('n', 'N', '', 'lines', {'epoch': [0., 1., 2.], 'a': [1., math.nan, 3.], 'b': [2., 2., 2.]})
    drawn = figures.draw(lines, thumbnail).axes[0].lines
    assert figures.table_csv(lines).splitlines() == ['epoch,a,b', '0.0,1.0,2.0', '1.0,,2.0', '2.0,3.0,2.0']
    np.testing.assert_array_equal([line.get_ydata() for line in drawn], [[1, math.nan, 3], [2, 2, 2]])
    assert len({(line.get_linestyle(), line.get_marker()) for line in drawn}) == 2


def test_charts_of_weights():
    weights = np.array([[.9, .1], [.8, .2], [.3, .7], [.52, .48]])
    history = {'epoch': [0., 1.], 'assignment_accuracy': [50., 75.], **{
        f'{name}weight_{i}': [.5, .6] for name in ('', 'a_', 'b_') for i in (0, 1)}, 'a_assigned_0': [.2, .9],
        'a_assigned_1': [.8, .1], 'b_assigned_0': [.5, .4], 'b_assigned_1': [.5, .6]}
    seen = Seen(history, ['a', 'b'], np.array([0, 0, 1, 1]), weights, list('wxyz'), lambda index: index)
    found = {c.name: c for c in weight_charts(seen, lambda x: [_features(x, 3), _features(x, 5)])}
    assert found['assignment'].table['a, by branch 0'] == [20, 90]
    assert found['assignment'].table['b, by branch 1'] == [50, 60]
    assert found['weights_by_component'].table['branch 0'] == pytest.approx([.85, .41])
    images = found['images_by_branch'].table
    assert images['image'][:3] == [0, 1, 3] and images['group'][:3] == ['branch 0'] * 3
    assert images['image'][images['group'].index('between')] == 3
    features = found['weighted_features'].table
    assert [v for v, g in zip(features['value'], features['group']) if g == 'branch 1'][:5] == [5.] * 5


def _features(indices, width):
    import torch

    return torch.full((len(indices), width), float(-width))


# -- in a browser -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('width', [390, 1280])
def test_opens_in_a_browser(runs, tmp_path, width):  # noqa: F811
    browser = next(filter(None, map(shutil.which, ('chromium', 'google-chrome', 'chrome'))), None)
    if browser is None:
        pytest.skip('needs Chromium')
    long = tmp_path / 'textures_tf_efficientnet_lite0_lr3e-4_norms-frozen_wise-ft_seed42'
    shutil.copytree(runs['plain'], long)
    assert main(['report', str(long), '--cpu', '--output', str(tmp_path)]) == 0
    # The page in a frame of the width, which says how wide its content is.
    (tmp_path / 'frame.html').write_text(
        f'<iframe id=f src=index.html style="width:{width}px;height:900px;border:0"></iframe><p id=p></p><script>'
        'f.onload = () => { const d = f.contentDocument; p.textContent = "found " + d.querySelectorAll("svg").length +'
        ' " wide " + d.documentElement.scrollWidth + " table " + d.querySelector(".wide").scrollWidth; }</script>')
    dump = subprocess.run(
        [browser, '--headless', '--no-sandbox', '--disable-gpu', '--allow-file-access-from-files', '--dump-dom',
         '--virtual-time-budget=3000', (tmp_path / 'frame.html').as_uri()], capture_output=True, text=True, timeout=120)
    svgs, wide, table = map(int, re.search(r'found (\d+) wide (\d+) table (\d+)', dump.stdout).groups())
    assert svgs == len(Page(tmp_path / 'index.html').of('svg')) >= 4 and wide <= width
    assert width < 1000 or table <= 992  # that of the results is not cut
