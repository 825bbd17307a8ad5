"""The policy's record against counting by hand, and the CSV files."""
import itertools

import pytest
import torch
from conftest_engine import rows

from timm_amf.engine.evaluate import Tally
from timm_amf.models.records import PolicyRecord, best_assignment
from timm_amf.text import CsvLog


def test_policy_row_against_a_naive_loop():
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(101, 3, generator=generator).softmax(1)
    component = torch.randint(0, 2, (101,), generator=generator)
    record = PolicyRecord(3, ['a', 'b'])
    for low in range(0, 101, 16):
        record.update(dict(weights=weights[low:low + 16]), component[low:low + 16])
    row = record.row()

    samples = list(zip(weights.tolist(), component.tolist()))
    for branch in range(3):
        assert row[f'weight_{branch}'] == pytest.approx(sum(w[branch] for w, _ in samples) / 101)
        for c, name in enumerate('ab'):
            own = [w[branch] for w, k in samples if k == c]
            assert row[f'{name}_weight_{branch}'] == pytest.approx(sum(own) / len(own))
    best = max(
        sum(w.index(max(w)) == order[k] for w, k in samples) for order in itertools.permutations(range(3), 2))
    assert row['assignment_accuracy'] == pytest.approx(100 * best / 101)


@pytest.mark.parametrize('votes, expected', [
    ([[10, 0], [0, 10]], [(0, 0), (1, 1)]),
    ([[0, 10], [10, 0]], [(0, 1), (1, 0)]),
    ([[9, 1], [8, 2]], [(0, 0), (1, 1)]),
    ([[5, 0, 0], [0, 0, 5]], [(0, 0), (1, 2)]),
    ([[4, 0], [0, 5], [9, 9]], [(1, 1), (2, 0)]),
])
def test_best_assignment(votes, expected):
    assert sorted(best_assignment(torch.tensor(votes, dtype=torch.float64))) == expected


def test_best_assignment_is_that_of_the_hungarian_algorithm():
    from scipy.optimize import linear_sum_assignment

    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 2), (3, 3), (4, 2), (2, 5)):
        votes = torch.randint(0, 50, shape, generator=generator).double()
        c, b = linear_sum_assignment(votes.numpy(), maximize=True)
        assert sum(votes[i, j].item() for i, j in best_assignment(votes)) == votes.numpy()[c, b].sum()


def votes(record, counts):
    """A record of so many samples of each component that each branch got."""
    for c, row in enumerate(counts):
        for branch, count in enumerate(row):
            weights = torch.full((count, len(row)), 0.1)
            weights[:, branch] = 0.9
            record.update(dict(weights=weights), torch.full((count,), c))
    return record


def test_assignment_by_component_keeps_the_matching_of_the_first_evaluation():
    """So that a policy that flips does not look like one that never moved (AMF, section IV-C4)."""
    history = []
    for counts in ([[6, 4], [2, 8]], [[0, 10], [10, 0]]):
        record = votes(PolicyRecord(2, ['a', 'b']), counts)
        record.history = history
        history.append({key: str(value) for key, value in record.row().items()})  # as a resumed run reads them
    first, flipped = history
    for row in history:
        assert (row['a_branch'], row['b_branch']) == ('0', '1')
    found = [[float(row[f'{c}_{key}']) for key in ('assigned_0', 'assigned_1', 'assignment_accuracy')]
             for row in history for c in 'ab']
    assert found == [[.6, .4, 60], [.2, .8, 80], [0, 1, 0], [1, 0, 0]]
    assert float(first['assignment_accuracy']) == 70 and float(flipped['assignment_accuracy']) == 100


def test_a_component_more_than_branches_has_no_branch():
    row = votes(PolicyRecord(2, ['a', 'b', 'c']), [[5, 0], [1, 1], [0, 5]]).row()
    assert (row['a_branch'], row['b_branch'], row['c_branch']) == (0, '', 1)
    assert (row['b_assigned_0'], row['b_assignment_accuracy']) == (.5, '')


def test_one_component_has_no_assignment_accuracy():
    record = PolicyRecord(2, ['only'])
    record.update(dict(weights=torch.tensor([[.2, .8]])), torch.tensor([0]))
    assert record.row()['assignment_accuracy'] == ''


def test_tally_against_a_naive_loop():
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(50, 7, generator=generator)
    target = torch.randint(0, 7, (50,), generator=generator)
    component = torch.randint(0, 3, (50,), generator=generator)
    tally = Tally(['a', 'b', 'c'], 7)
    for low in range(0, 50, 8):
        tally.update(output[low:low + 8], target[low:low + 8], component[low:low + 8])
    metrics = tally.metrics()

    losses, hits, hits5 = [], [], []
    for o, t in zip(output.double(), target):
        losses.append(float(o.exp().sum().log() - o[t]))
        ranking = o.argsort(descending=True).tolist()
        hits.append(ranking[0] == t)
        hits5.append(int(t) in ranking[:5])
    assert metrics['loss'] == pytest.approx(sum(losses) / 50, rel=1e-6)
    assert metrics['top1'] == pytest.approx(100 * sum(hits) / 50)
    assert metrics['top5'] == pytest.approx(100 * sum(hits5) / 50)
    for c, name in enumerate('abc'):
        own = [h for h, k in zip(hits, component.tolist()) if k == c]
        assert metrics[f'top1_{name}'] == pytest.approx(100 * sum(own) / len(own))


def test_fewer_than_five_classes():
    tally = Tally(['a'], 3)
    tally.update(torch.eye(3), torch.tensor([0, 1, 0]), torch.zeros(3, dtype=torch.int64))
    assert tally.metrics()['top5'] == 100 and tally.metrics()['top1'] == pytest.approx(200 / 3)


def test_csv_log_grows_columns_replaces_rows_and_cuts_at_the_resumed_epoch(tmp_path):
    log = CsvLog(tmp_path / 'a.csv')
    log.append(dict(epoch=0, loss=0.1))
    log.append(dict(epoch=1, loss=0.2, top1=50.))
    log.append(dict(epoch=1, loss=0.3, top1=51.))
    assert rows(tmp_path / 'a.csv') == [
        dict(epoch='0', loss='0.1', top1=''), dict(epoch='1', loss='0.3', top1='51.0')]
    log = CsvLog(tmp_path / 'a.csv', start_epoch=1)
    log.append(dict(epoch=1, loss=1 / 3))
    assert [r['loss'] for r in rows(tmp_path / 'a.csv')] == ['0.1', repr(1 / 3)]
