"""Plots of a search: what is drawn where, and that nothing covers anything."""
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from timm_amf.errors import UserError
from timm_amf.search.candidates import Candidate
from timm_amf.search.plots import plot_search, search_figure
from timm_amf.search.results import CandidateResult, SearchResults

pytest.importorskip('matplotlib')


def result(way, position, top1, name=None) -> CandidateResult:
    candidate = Candidate(name or way, way, position, ('m',))
    return CandidateResult(candidate, top1, 1., 1000, 1000, 50)


def search(layers=27, blocks=13, windows=25, tops=(3, 5), model='net', seed=0) -> SearchResults:
    """Accuracies that rise towards the middle, with noise."""
    rng = np.random.default_rng(seed)
    found = [result('classifier', 0, 78.1), result('all', 0, 86.3)]
    for way, number, name in (
            ('layer', layers, 'blocks.{0}.{1}.conv_pwl'), ('block', blocks, 'blocks.{0}.{1}'),
            ('window', windows, 'blocks.{0}.{1}.conv_dw..blocks.{0}.{2}.conv_pwl')):
        for i in range(number):
            top1 = 76 + 10 * (1 - abs(2 * i / max(number - 1, 1) - 1)) + rng.uniform(-2, 2)
            named = name.format(i // 4, i % 4, i % 4 + 1)
            found.append(result(way, i, round(top1, 1), named))
    found += [result(f'top{k}', 0, 84. + k / 2) for k in tops]
    # As a search finds them: from the output to the input.
    return SearchResults(model, 'backbone', seed, 5, 367, found[:2] + found[:1:-1])


def by_label(axes) -> dict:
    return dict(zip(*reversed(axes.get_legend_handles_labels())))


def boxes(figure, artists) -> list:
    figure.draw_without_rendering()
    return [artist.get_window_extent() for artist in artists]


def legend_labels(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_points_and_bars():
    results = search()
    figure = search_figure(results)
    assert [axes.get_title('left').split(':')[0] for axes in figure.axes] == ['Layers', 'Blocks', 'Windows']
    for way, axes in zip(('layer', 'block', 'window'), figure.axes):
        found, best, drawn = results.of_way(way), results.winner(way), by_label(axes)
        for label, chosen in (
                ('candidate', [r for r in found if r is not best]), ('best of the way', [best])):
            x, y = drawn[label].get_data()
            assert list(zip(x, y)) == [(r.candidate.position, r.top1) for r in chosen], label
        assert f'{best.candidate.name}, {best.top1:.1f} %' in axes.get_title('left')
        # Bars are Wilson's intervals, of 95 %: centre and half width by the textbook's formula.
        bars = [segment for c in axes.collections for segment in getattr(c, 'get_segments', list)()]
        assert len(bars) == len(found)
        for r, ((x, low), (_, high)) in zip(found, bars):
            p, n, z2 = r.top1 / 100, 1000, 1.959963985 ** 2
            centre, half = (p + z2 / 2 / n), (z2 * (p * (1 - p) / n + z2 / 4 / n ** 2)) ** 0.5
            assert (x, low, high) == pytest.approx((
                r.candidate.position, 100 * (centre - half) / (1 + z2 / n), 100 * (centre + half) / (1 + z2 / n)))


def test_baselines_and_top_layers():
    results = search()
    figure = search_figure(results, level=0.8)
    low, high = results.results[0].interval(0.8)
    for i, axes in enumerate(figure.axes):
        drawn = by_label(axes)
        assert list(drawn['classifier (baseline I)'].get_ydata()) == [78.1, 78.1]
        assert list(drawn['all (baseline II)'].get_ydata()) == [86.3, 86.3]
        bands = [(p.get_y(), p.get_y() + p.get_height()) for p in axes.patches]
        assert any(band == pytest.approx((low, high)) for band in bands) and len(bands) == 2
        tops = {label: line.get_ydata()[0] for label, line in drawn.items() if label.startswith('top')}
        assert tops == ({'top3 layers together': 85.5, 'top5 layers together': 86.5} if i == 0 else {})
        left, right = axes.get_xlim()
        assert left < 0 and right > len(results.of_way(('layer', 'block', 'window')[i])) - 1
    assert '80 % intervals' in figure.get_suptitle()


def test_lines_differ_without_colour():
    lines = [line for line in search_figure(search()).axes[0].lines if line.get_marker() == 'None']
    assert len(lines) == 4 and len({str(line._dash_pattern) for line in lines}) == 4


def test_ways_with_one_candidate_have_no_panel():
    figure = search_figure(search(layers=0, tops=(), windows=1))
    assert [axes.get_title('left').split(':')[0] for axes in figure.axes] == ['Blocks']
    assert legend_labels(figure) == ['classifier (baseline I)', 'all (baseline II)', 'candidate', 'best of the way']
    with pytest.raises(UserError, match='net: no way of the search has two candidates'):
        search_figure(search(1, 0, 0))


@pytest.mark.parametrize('sizes', [(27, 13, 25), (60, 60, 60), (300, 20, 298)])
def test_names_are_readable(sizes):
    results = search(*sizes)
    figure = search_figure(results)
    for axes, way, number in zip(figure.axes, ('layer', 'block', 'window'), sizes):
        labels = axes.get_xticklabels()
        assert len(labels) == number if number <= 60 else 40 < len(labels) < number
        bold = [label for label in labels if label.get_fontweight() == 'bold']
        winner = results.winner(way)
        assert [label.get_position()[0] for label in bold] == [winner.candidate.position]
        name = bold[0].get_text()
        assert winner.candidate.name.startswith(name[:-2] if way == 'window' else name)
        # Neighbours do not touch; slanted ones are apart by construction of their angle.
        if labels[0].get_rotation() == 90:
            spans = sorted((box.x0, box.x1) for box in boxes(figure, labels))
            assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:]))


@pytest.mark.parametrize('sizes', [(5, 0, 3), (60, 60, 60)])
def test_nothing_is_covered_or_cut(sizes):
    figure = search_figure(search(*sizes))
    _check_layout(figure)


def test_long_titles_are_wrapped():
    results = search(0, 0, 0, ())
    results.model = 'vit_base_patch16_clip_quickgelu_384.some_long_tag_of_weights'
    path = 'branches.0.stages.{}.blocks.0.attention.query_key_value.projection'
    results.results += [result('window', i, 50. + i, f'{path.format(i)}..{path.format(i + 1)}') for i in (1, 2)]
    figure = search_figure(results)
    _check_layout(figure)
    assert 'projection, 52.0 %' in figure.axes[0].get_title('left').replace('\n', ' ')


def _check_layout(figure):
    figure.draw_without_rendering()
    width, height = figure.bbox.size
    parts = [axes.get_tightbbox() for axes in figure.axes] + [figure.legends[0].get_window_extent()]
    parts.append(figure._suptitle.get_window_extent())
    for box in parts:
        assert box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height
    for i, one in enumerate(parts):
        assert not any(one.overlaps(other) for other in parts[:i])


def test_long_names_are_cut_at_the_front():
    results = search(0, 0, 0, ())
    results.results += [result('layer', i, 50., f'branches.0.features.denseblock{i}.denselayer1.conv2') for i in (1, 2)]
    labels = [label.get_text() for label in search_figure(results).axes[0].get_xticklabels()]
    assert labels == ['…denseblock1.denselayer1.conv2', '…denseblock2.denselayer1.conv2']


def test_unfinished_search():
    results = search(10, 0, 0, ())
    results.results = [r for r in results.results if r.candidate.way == 'layer' and r.candidate.position > 6]
    axes, = search_figure(results).axes
    assert set(by_label(axes)) == {'candidate', 'best of the way'}
    assert sorted(axes.get_xticks()) == [7, 8, 9]


def test_png(tmp_path):
    path = tmp_path / 'plots' / 'search.PNG'
    plot_search(search(), path)
    image = Image.open(path)
    assert image.format == 'PNG' and min(image.size) > 1000
    pixels = np.asarray(image.convert('RGB'))
    assert all((pixels == colour).all(-1).sum() > 100 for colour in ((0, 114, 178), (213, 94, 0), (0, 158, 115)))
    assert list(path.parent.iterdir()) == [path]


def test_svg(tmp_path):
    plot_search(search(), tmp_path / 'plot.svg')
    assert ElementTree.parse(tmp_path / 'plot.svg').getroot().tag.endswith('svg')
    assert b'dc:date' not in (tmp_path / 'plot.svg').read_bytes()


def test_mistakes(tmp_path, monkeypatch):
    with pytest.raises(UserError, match='.png or .svg'):
        plot_search(search(), tmp_path / 'plot.jpg')
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='cannot be written'):
        plot_search(search(), tmp_path / 'file' / 'plot.png')
    monkeypatch.setitem(sys.modules, 'matplotlib.backends.backend_agg', None)
    with pytest.raises(ImportError):
        plot_search(search(), tmp_path / 'plot.png')


def test_matplotlib_is_imported_when_used_and_pyplot_never():
    code = (
        'import sys; from timm_amf.search.plots import search_figure; print("matplotlib" in sys.modules);'
        'from timm_amf.search.results import *; from timm_amf.search.candidates import Candidate;'
        'r = [CandidateResult(Candidate(n, "block", i, (n,)), 50., 1., 10, 1, 1) for i, n in enumerate("ab")];'
        'search_figure(SearchResults("n", "backbone", 0, 2, 10, r)).canvas.draw();'
        'print("matplotlib" in sys.modules, "matplotlib.pyplot" in sys.modules)')
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ['False', 'True', 'False']


