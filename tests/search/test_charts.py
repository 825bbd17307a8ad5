"""Figures of a search and of a sweep: what is drawn where, that nothing covers anything, and their files."""
import itertools
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

pytest.importorskip('matplotlib')

from timm_amf.errors import UserError
from timm_amf.figures import draw, write_sheet
from timm_amf.search.candidates import Candidate
from timm_amf.search.charts import search_charts, sweep_charts
from timm_amf.search.results import CandidateResult, SearchResults
from timm_amf.search.sweep_results import Configuration, Sweep, ranked


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


def lines(chart) -> dict:
    axes, = draw(chart).axes
    return {label: list(zip(*line.get_data())) for line, label in zip(*axes.get_legend_handles_labels())}


def points(line) -> list:
    return [(x, y) for x, y in line if y == y]


def boxes(figure, artists) -> list:
    figure.draw_without_rendering()
    return [artist.get_window_extent() for artist in artists]


def check_layout(figure) -> None:
    """Nothing is cut, nothing covers anything."""
    figure.draw_without_rendering()
    width, height = figure.bbox.size
    parts = [axes.get_tightbbox() for axes in figure.axes] + boxes(figure, figure.legends)
    for box in parts:
        assert box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height
    assert not any(one.overlaps(other) for one, other in itertools.combinations(parts, 2))


# -- a search ---------------------------------------------------------------------------------------------------------


def test_candidates_and_baselines():
    results = search()
    charts = search_charts(results)
    assert [chart.title.split(':')[0] for chart in charts] == ['Layers', 'Blocks', 'Windows']
    for way, chart in zip(('layer', 'block', 'window'), charts):
        found, best, drawn = results.of_way(way), results.winner(way), lines(chart)
        assert drawn['accuracy'] == [(r.candidate.position, r.top1) for r in found]
        assert points(drawn['best']) == [(best.candidate.position, best.top1)]
        assert f'{best.candidate.name}, {best.top1:.1f} %' in chart.title
        assert {y for _, y in drawn['classifier (baseline I)']} == {78.1}
        assert {y for _, y in drawn['all (baseline II)']} == {86.3}
        tops = {label: line[0][1] for label, line in drawn.items() if label.startswith('top')}
        assert tops == ({'top3 layers': 85.5, 'top5 layers': 86.5} if way == 'layer' else {})
        # Bands are Wilson's intervals, of 95 %: centre and half width by the textbook's formula.
        band = draw(chart).axes[0].collections[0].get_paths()[0].vertices
        for r in found:
            p, n, z2 = r.top1 / 100, 1000, 1.959963985 ** 2
            centre, half = (p + z2 / 2 / n), (z2 * (p * (1 - p) / n + z2 / 4 / n ** 2)) ** 0.5
            limits = {y for x, y in band.tolist() if x == r.candidate.position}
            assert (min(limits), max(limits)) == pytest.approx((
                100 * (centre - half) / (1 + z2 / n), 100 * (centre + half) / (1 + z2 / n)))


def test_lines_differ_without_colour():
    drawn = draw(search_charts(search())[0]).axes[0].lines
    assert len(drawn) == 6 and len({(str(line._dash_pattern), line.get_marker()) for line in drawn}) == 6


def test_ways_with_one_candidate_have_no_chart():
    chart, = search_charts(search(layers=0, tops=(), windows=1))
    assert chart.name == 'search_block' and search_charts(search(1, 0, 0)) == []


@pytest.mark.parametrize('sizes', [(27, 13, 25), (60, 60, 60), (300, 20, 298)])
def test_names_are_readable(sizes):
    results = search(*sizes)
    for chart, way, number in zip(search_charts(results), ('layer', 'block', 'window'), sizes):
        figure = draw(chart)
        labels = figure.axes[0].get_xticklabels()
        assert len(labels) == number if number <= 60 else 40 < len(labels) < number
        position = int(labels[2].get_position()[0])
        name = results.of_way(way)[position].candidate.name
        assert name.startswith(labels[2].get_text().rstrip('.'))
        spans = sorted((box.x0, box.x1) for box in boxes(figure, labels))
        assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:]))
        check_layout(figure)


def test_long_names_are_cut_at_the_front():
    results = search(0, 0, 0, ())
    results.results += [result('layer', i, 50., f'branches.0.features.denseblock{i}.denselayer1.conv2') for i in (1, 2)]
    figure = draw(search_charts(results)[0])
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels == [f'…nseblock{i}.denselayer1.conv2' for i in (1, 2)]


# -- a sweep ----------------------------------------------------------------------------------------------------------


def configuration(number, values, scores, end='complete', **more) -> Configuration:
    return Configuration(number, values, {seed: {'top1': s, 'loss': -s, **more} for seed, s in enumerate(scores)}, end)


def swept(given) -> list:
    return sweep_charts(Sweep(Path('x'), 'top1', ranked(given, 'top1'), 'net'))


def test_figure_of_a_grid():
    """A chart for each setting, in it a line for each value of the other; points where the means are."""
    grid = itertools.product(('0.1', '0.001', '0.01'), ('0', '1'))
    given = [configuration(i, {'lr': lr, 'reinit-blocks': k}, [50. + i, 52. + i]) for i, (lr, k) in enumerate(grid)]
    given.append(configuration(6, {'lr': '1', 'reinit-blocks': '0'}, [], 'diverged: seed 0'))
    one, other = swept(given)
    assert (one.x, other.x) == ('lr', 'reinit-blocks') and (one.log, other.log) == (True, False)
    assert lines(one)['reinit-blocks=1'] == [(0.001, 54.), (0.01, 56.), (0.1, 52.)]
    assert lines(other)['lr=0.01'] == [(0, 55.), (1, 56.)] and points(lines(one)['best']) == [(0.01, 56.)]
    assert one.table['reinit-blocks=1_low'] == [53., 55., 51.] and one.table['reinit-blocks=1_high'] == [55., 57., 53.]
    figure = draw(one)
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ['0.001', '0.01', '0.1']
    check_layout(figure)


def test_figure_of_a_mixture():
    """AMF's Figure 4: a line for each component, the other LR as in the best."""
    given = [
        Configuration(2 * i + j, {'branch.0.lr': a, 'branch.1.lr': b}, {0: {
            'top1': 60. + i + j, 'top1_birds': 50. + i, 'top1_cars': 70. - j, 'loss': 1.}}, 'complete')
        for i, a in enumerate(('0.001', '0.01')) for j, b in enumerate(('0.1', '0.2'))]
    one, other = map(lines, swept(given))
    assert one['birds'] == [(0.001, 50), (0.01, 51)] and one['cars'] == [(0.001, 69), (0.01, 69)]
    assert other['all'] == [(0.1, 61), (0.2, 62)] and other['cars'] == [(0.1, 70), (0.2, 69)]


def test_figure_of_draws():
    """Dots without lines; words have places."""
    rng = np.random.default_rng(0)
    given = [
        configuration(i, {'lr': float(10 ** rng.uniform(-5, -1)), 'drop': rng.uniform(), 'opt': ('b', 'a')[i % 2]}, [i])
        for i in range(9)]
    one, _, other = swept(given)
    assert sorted(lines(one)['configuration']) == sorted((c.values['lr'], c.mean) for c in given)
    axes, = draw(one).axes
    assert axes.lines[0].get_linestyle() == 'None' and all('$' not in t.get_text() for t in axes.get_xticklabels())
    assert [text.get_text() for text in draw(other).axes[0].get_xticklabels()] == ['b', 'a']
    assert {x for x, y in lines(other)['configuration'] if y in (8, 0)} == {0}
    assert swept(given[:1]) == []


# -- files ------------------------------------------------------------------------------------------------------------


def test_files(tmp_path):
    charts = search_charts(search())
    for name in ('search.png', 'search.svg'):
        write_sheet(charts, tmp_path / 'figures' / name)
    image = Image.open(tmp_path / 'figures' / 'search.png')
    assert image.format == 'PNG' and min(image.size) > 1000
    pixels = np.asarray(image.convert('RGB'))
    assert all((pixels == colour).all(-1).sum() > 100 for colour in ((0, 114, 178), (213, 94, 0), (0, 158, 115)))
    text = (tmp_path / 'figures' / 'search.svg').read_text()
    assert ElementTree.fromstring(text).tag.endswith('svg') and 'dc:date' not in text
    assert all(chart.title in text for chart in charts)
    assert len(list((tmp_path / 'figures').iterdir())) == 2
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='cannot be written'):
        write_sheet(charts, tmp_path / 'file' / 'plot.png')


def test_matplotlib_is_imported_when_used_and_pyplot_never():
    code = (
        'import sys; from timm_amf.search.charts import search_charts; from timm_amf.figures import draw;'
        'print("matplotlib" in sys.modules);'
        'from timm_amf.search.results import *; from timm_amf.search.candidates import Candidate;'
        'r = [CandidateResult(Candidate(n, "block", i, (n,)), 50., 1., 10, 1, 1) for i, n in enumerate("ab")];'
        'draw(search_charts(SearchResults("n", "backbone", 0, 2, 10, r))[0]).canvas.draw();'
        'print("matplotlib" in sys.modules, "matplotlib.pyplot" in sys.modules)')
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ['False', 'True', 'False']
