"""Tables of a search, against other formulations of the same figures."""
import csv
import math

import numpy as np
import pytest

from timm_amf.errors import UserError
from timm_amf.search.candidates import Candidate
from timm_amf.search.results import (
    BASELINES,
    CandidateResult,
    SearchResults,
    difference_interval,
    ranking,
    summary,
    write_csv,
)


def result(way, position=0, top1=50., name=None, modules=('m',), images=1000, **values) -> CandidateResult:
    values = {'loss': 1., 'parameters': 1000, 'epochs': 50, **values}
    name = name or (way if way in BASELINES else f'{way}{position}')
    return CandidateResult(Candidate(name, way, position, modules), top1, images=images, **values)


def search(results, model='net', seed=0, **values) -> SearchResults:
    return SearchResults(model, 'backbone', seed, 5, 367, list(results), **values)


@pytest.fixture
def found() -> SearchResults:
    """Of 1000 images: level with 90 % is what has 87.3 %, but not 87.2 % (see `test_level`)."""
    return search([
        result('classifier', top1=70., modules=()),
        result('all', top1=87.3, modules=('',), parameters=2_223_872),
        result('layer', 0, 60., 'conv_stem', ('conv_stem', 'bn1')),
        result('layer', 1, 87.2, 'blocks.0.0.conv_dw'),
        result('layer', 2, 71., 'blocks.0.0.conv_pw', loss=math.nan),
        result('block', 0, 90., 'stem', parameters=3000),
        result('block', 1, 90., 'blocks.0.0', parameters=2000),
        result('top3', 0, 80., 'top3'),
    ])


def wilson(hits, count, z):
    """The limits as the roots of (p - share)^2 = z^2 p (1 - p) / count."""
    share = hits / count
    return sorted(np.roots([1 + z * z / count, -2 * share - z * z / count, share * share]).real)


def interval_text(hits, z=1.959963985):
    low, high = wilson(hits, 1000, z)
    return f'{100 * low:.2f} to {100 * high:.2f}'


def test_difference_of_the_published_example():
    # Newcombe (1998), table II: 56 of 70 less 48 of 80, method 10.
    first, second = result('layer', 0, 5600 / 70, images=70), result('layer', 1, 4800 / 80, images=80)
    assert difference_interval(first, second) == pytest.approx((5.24, 33.39), abs=0.005)
    low, high = difference_interval(second, first)
    assert (-high, -low) == pytest.approx((5.24, 33.39), abs=0.005)


def test_level():
    best = result('layer', 0, 90.)
    marks = {}
    for i, hits in enumerate(range(840, 900), 1):
        rows = ranking(search([best, result('layer', i, hits / 10)]))
        marks[hits] = rows[-1][-1] == 'level with the best'
        (low1, _), (_, high2) = wilson(900, 1000, 1.959963985), wilson(hits, 1000, 1.959963985)
        lower = 0.9 - hits / 1000 - ((0.9 - low1) ** 2 + (high2 - hits / 1000) ** 2) ** 0.5
        assert marks[hits] == (lower <= 0), hits
    assert marks[873] and not marks[872]


def test_ranking(found):
    _, *rows = ranking(found)
    assert found.title == 'net backbone, seed 0: 5 classes, trained on 367 images, validated on 1000'
    assert [row[2] for row in rows] == [
        'blocks.0.0', 'stem', 'all', 'blocks.0.0.conv_dw', 'top3', 'blocks.0.0.conv_pw', 'classifier', 'conv_stem']
    assert [row[0] for row in rows] == [str(i) for i in range(1, 9)]
    assert rows[0][3:] == ['90.00', interval_text(900), '50', '2,000', 'best']
    assert [row[-1] for row in rows[1:4]] == ['level with the best', 'level with the best', '']
    assert rows[2][1] == 'all (baseline II)' and rows[6][1] == 'classifier (baseline I)'
    assert [(row[0], row[2]) for row in ranking(found, limit=1)[1:]] == [
        ('1', 'blocks.0.0'), ('3', 'all'), ('4', 'blocks.0.0.conv_dw'), ('5', 'top3'), ('7', 'classifier')]


def test_summary(found):
    rows = {row[0]: row[1:] for row in summary(found)}
    assert rows['way'] == ['candidates', 'best', 'top-1', '95 % interval', 'mean', 'worst']
    assert rows['layer'] == ['3', 'blocks.0.0.conv_dw', '87.20', interval_text(872), '72.73', '60.00']
    assert rows['block'][:3] == ['2', 'blocks.0.0', '90.00']
    assert list(rows)[1:] == ['classifier (baseline I)', 'all (baseline II)', 'layer', 'block', 'top3']


def test_summary_of_winners_trained_anew(found):
    found.final_images = 2569
    found.final = [result('classifier', top1=75.), result('block', 1, 93., 'blocks.0.0')]
    rows = {row[0]: row[1:] for row in summary(found)}
    assert rows['way'][-2:] == ['on 2569 images', '95 % interval']
    assert rows['block'][-2:] == ['93.00', interval_text(930)] and rows['layer'][-2:] == ['', '']


def test_csv(found, tmp_path):
    found.final = [result('all', top1=91., modules=('',)), result('block', 1, 93., 'blocks.0.0')]
    path = tmp_path / 'new' / 'candidates.csv'
    write_csv(found, path)
    rows = list(csv.DictReader(path.open(encoding='utf-8')))
    assert list(rows[0]) == (
        'way position name modules phase top1 top1_low top1_high loss images parameters epochs rank').split()
    assert [row['phase'] for row in rows] == ['search'] * 8 + ['final'] * 2
    assert [row['rank'] for row in rows] == [*map(str, range(1, 9)), '1', '2']
    by_name = {(row['phase'], row['name']): row for row in rows}
    stem = by_name['search', 'conv_stem']
    assert stem['modules'] == 'conv_stem bn1' and (stem['way'], stem['position']) == ('layer', '0')
    assert [float(stem[n]) / 100 for n in ('top1_low', 'top1_high')] == pytest.approx(
        wilson(600, 1000, 1.959963985), abs=1e-7)
    assert by_name['search', 'blocks.0.0.conv_pw']['loss'] == ''
    assert by_name['final', 'blocks.0.0']['top1'] == '93.0'
    assert list(path.parent.iterdir()) == [path]


def test_csv_whole_or_not_at_all(found, tmp_path, monkeypatch):
    path = tmp_path / 'candidates.csv'
    path.write_text('before', encoding='utf-8')

    def full(*_, **__):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr('os.replace', full)
    with pytest.raises(UserError, match=r'candidates.csv: cannot be written \(no space left'):
        write_csv(found, path)
    monkeypatch.undo()
    assert path.read_text(encoding='utf-8') == 'before' and list(tmp_path.iterdir()) == [path]
    with pytest.raises(UserError, match='cannot be written'):
        write_csv(found, path / 'below_a_file.csv')
