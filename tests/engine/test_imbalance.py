"""Weights of classes in the loss, and classes drawn equally often."""
import numpy as np
import pytest
import torch
from conftest_engine import ONE, SMALL, assert_same_run
from test_resume import Killed, kill_at
from torch import nn

from timm_amf import UserError
from timm_amf.data import DataSpec, create_dataset
from timm_amf.engine.options import parse_args
from timm_amf.engine.task import WeightedCrossEntropy, class_weights, create_criterion


@pytest.fixture
def train(folders):
    """9, 4 and 1 images of three classes."""
    data = create_dataset(DataSpec.from_mapping({'root': str(folders / 'stripes')}))
    return data.subset([*range(9), *range(9, 13), 18])


def test_balanced_is_scikit_learns(train):
    utils = pytest.importorskip('sklearn.utils.class_weight')
    expected = utils.compute_class_weight('balanced', classes=np.arange(3), y=train.targets)
    assert torch.allclose(class_weights('balanced', train), torch.tensor(expected, dtype=torch.float32))
    assert class_weights('balanced', train, 5)[3:].tolist() == [1, 1]
    empty = train.subset(range(13))
    assert class_weights('balanced', empty).tolist() == pytest.approx([13 / 18, 13 / 8, 1])


@pytest.mark.parametrize('text, match', [
    ('class,weight\nclass0,1\nclass1,2\n', "class 'class2' has no weight"), ('a,b\n', 'class and weight, not a, b'),
    ('class,weight\nclass0,1\nclass1,2\nclass2,3\nx,1', "no class is named 'x'"),
    ('class,weight\nclass0,1\nclass1,-2\nclass2,3', "weight of class 'class1' is '-2'"),
])
def test_files_that_do_not_fit(train, tmp_path, text, match):
    (tmp_path / 'w.csv').write_text(text)
    with pytest.raises(UserError, match=match) as error:
        class_weights(str(tmp_path / 'w.csv'), train)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('smoothing', [0., 0.1])
def test_the_loss(smoothing):
    torch.manual_seed(0)
    x, target, weight = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 0, 1]), torch.tensor([0.5, 1., 3.])
    loss = WeightedCrossEntropy(weight, smoothing)(x, target)
    by_torch = nn.CrossEntropyLoss(weight, label_smoothing=smoothing)(x, target)
    assert torch.allclose(loss, by_torch * weight[target].mean())
    # The mean over images does not depend on how they are dealt to batches.
    parts = [WeightedCrossEntropy(weight, smoothing)(x[i::2], target[i::2]) for i in (0, 1)]
    assert torch.allclose(loss, sum(parts) / 2)
    soft = nn.functional.one_hot(target, 3).float()
    assert torch.allclose(WeightedCrossEntropy(weight, smoothing)(x, soft), WeightedCrossEntropy(weight)(x, target))


def test_of_options(train, folders, tmp_path):
    (tmp_path / 'w.csv').write_text('class,weight\nclass2,3\nclass0,1\nclass1,0.5\n')
    base = [str(folders / 'stripes'), '--model', 'test_resnet', '--class-weight', str(tmp_path / 'w.csv')]
    assert create_criterion(parse_args(base), False, train).weight.tolist() == [1, .5, 3]
    assert create_criterion(parse_args([*base, '--mixup', '.2']), True, train).weight.tolist() == [1, .5, 3]
    assert create_criterion(parse_args([*base, '--bce-loss']), False, train).weight.tolist() == [1, .5, 3]


@pytest.mark.parametrize('flags, match', [
    (['--class-weight', 'balanced', '--loss', 'asl'], 'asl takes no weights'),
    (['--class-weight', 'balanced', '--jsd-loss', '--aug-splits', '2'], 'jsd takes no weights'),
    (['--class-weight', 'nowhere.csv'], 'neither balanced nor a file'),
    (['--class-weight', 'balanced', '--class-sampling', 'balanced'], 'would balance twice'),
    (['--class-sampling', 'balanced', '--aug-repeats', '3'], 'combined with --aug-repeats'),
])
def test_combinations_that_are_refused(folders, flags, match):
    with pytest.raises(UserError, match=match):
        parse_args([str(folders / 'stripes'), '--model', 'test_resnet', *flags])


@pytest.mark.parametrize('base, flags', [
    (ONE, ['--class-sampling', 'balanced']),
    (SMALL, ['--class-weight', 'balanced', '--mixup', '0.3', '--branch-loss', '0.1'])])
def test_resume_is_exact(run, monkeypatch, base, flags):
    flags = [*flags, '--recovery-interval', '1', '--epochs', '2', '-b', '12']
    whole = run('whole', *flags, base=base)
    with monkeypatch.context() as patch:
        kill_at(patch, 1, 3)
        with pytest.raises(Killed):
            run('killed', *flags, base=base)
    assert_same_run(whole, run('killed', *flags, '--resume', 'auto', base=base))
