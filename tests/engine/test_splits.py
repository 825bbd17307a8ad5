"""Splits that were drawn, from the command line: kept by the run, whatever is added to its folder."""
import shutil

import pytest
from conftest_engine import assert_same_run, rows

from timm_amf.engine.evaluate_runs import RunOptions, evaluate_runs

BASE = ['--model', 'test_resnet', '--img-size', '32', '-b', '4', '--epochs', '3', '--workers', '0', '--lr', '0.05',
        '--cpu', '--warmup-epochs', '0', '--tracker', 'none', '--val-share', '0.2', '--test-share', '0.3']


@pytest.fixture
def images(folders, tmp_path):
    return shutil.copytree(folders / 'stripes' / 'train', tmp_path / 'images')


def test_added_images_change_neither_resume_nor_evaluation(run, images):
    whole = run('whole', base=BASE, data=[str(images)])
    listed = rows(whole / 'split.csv')
    assert [sum(row['split'] == s for row in listed) for s in ('train', 'val', 'test')] == [12, 6, 9]
    run('half', '--stop-epoch', '1', base=BASE, data=[str(images)])
    before = evaluate_runs([whole], RunOptions(split='test'))
    for k in range(3):
        for i in range(9):
            shutil.copy(images / f'class{k}' / f'{i}.png', images / f'class{k}' / f'new{i}.png')
    resumed = run('half', '--resume', 'auto', base=BASE, data=[str(images)])
    assert_same_run(whole, resumed)
    elsewhere = run('other', '--resume', str(whole), base=BASE, data=[str(images)])
    for folder in (resumed, elsewhere):
        assert (folder / 'split.csv').read_bytes() == (whole / 'split.csv').read_bytes()
    after = evaluate_runs([whole], RunOptions(split='test'))
    assert before == after and after[0].images == 9
    run('half', '--overwrite', base=BASE, data=[str(images)])
    assert len(rows(resumed / 'split.csv')) == 54
