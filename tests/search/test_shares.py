"""Shares of a data set, and what fits into a time."""
import numpy as np
import pytest
from PIL import Image

from timm_amf.data import Component, DataSpec, create_dataset
from timm_amf.errors import UserError
from timm_amf.search.shares import fit_budget, stratified

NUMBERS = {'a': 20, 'b': 11, 'c': 5, 'd': 3}


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    """Four classes of different sizes."""
    root = tmp_path_factory.mktemp('unequal')
    for label, number in NUMBERS.items():
        (root / 'train' / label).mkdir(parents=True)
        for i in range(number):
            Image.new('RGB', (4, 4)).save(root / 'train' / label / f'{i}.png')
    return create_dataset(DataSpec((Component('images', root=str(root)),)))


def files(part):
    return [part.filename(i) for i in range(len(part))]


def test_disjoint_and_by_class(dataset):
    parts = stratified(dataset, [0.1, 0.7, 0.2], seed=0)
    # By hand: images up to round(0.1 n), up to round(0.8 n), up to n, but one in each part at least.
    assert [p.class_counts().tolist() for p in parts] == [[2, 1, 1, 1], [14, 8, 3, 1], [4, 2, 1, 1]]
    found = [f for part in parts for f in files(part)]
    assert len(set(found)) == len(found) == len(dataset) and set(found) == set(files(dataset))


def test_labels_go_with_their_images(dataset):
    for part in stratified(dataset, [0.3, 0.3], seed=3):
        labels = [f.split('/')[-2] for f in files(part)]
        assert labels == [dataset.class_names[t] for t in part.targets]
        assert [part[i][1] for i in range(len(part))] == part.targets.tolist()


def test_what_shares_leave_is_in_no_part(dataset):
    (part,) = stratified(dataset, [0.5], seed=0)
    assert part.class_counts().tolist() == [10, 6, 2, 2]  # halves to the even number, as Python rounds
    assert part.num_classes == dataset.num_classes and len(dataset) == sum(NUMBERS.values())


def test_the_draw_follows_from_the_seed(dataset):
    first, again, other = (stratified(dataset, [0.4, 0.4], seed=s) for s in (5, 5, 6))
    assert [files(p) for p in first] == [files(p) for p in again]
    assert files(first[0]) != files(other[0])
    assert first[0].class_counts().tolist() == other[0].class_counts().tolist()


def test_classes_are_drawn_apart(dataset):
    """Not the same numbers of each class, as one draw for all of them would have."""
    (part,) = stratified(dataset, [0.5], seed=1)
    numbers = {label: {int(f.split('/')[-1][:-4]) for f in files(part) if f.split('/')[-2] == label} for label in 'ab'}
    assert {n for n in numbers['a'] if n < 11} != numbers['b']


def test_too_few_images(dataset):
    with pytest.raises(UserError, match="class 'd' has 3 images, too few for 4 parts"):
        stratified(dataset, [0.25] * 4, seed=0)


@pytest.mark.parametrize('usable,epochs,expected', [
    # 1000 images at 0.1 s and 100 at 0.5 s: validation takes 50 s, an epoch on all images 100 s.
    (1050, 50, (10, 1., 1., 1050)),     # ten epochs on all images, to the second
    (550, 50, (10, 0.5, 1., 550)),      # ten on half of them
    (2150, 50, (21, 1., 1., 2150)),     # more epochs once all images are there
    (1e6, 50, (50, 1., 1., 5050)),      # no more than asked for
    (350, 3, (3, 1., 1., 350)),         # fewer were asked for: they come first
    (90, 50, (10, 0.06, 0.6, 90)),      # validation gets a third
    (15, 50, (5, 0.02, 0.1, 15)),       # fewer than ten epochs on the smallest share
])
def test_fit(usable, epochs, expected):
    fit = fit_budget(usable / 0.9, 1000, 100, 0.1, 0.5, epochs, least_share=0.02)
    assert (fit.epochs, fit.share, fit.val_share, fit.seconds) == pytest.approx(expected)


def test_fit_is_never_over_the_time():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        train, val = rng.integers(50, 5000), rng.integers(20, 1000)
        train_cost, val_cost = rng.uniform(1e-3, 1), rng.uniform(1e-4, 0.3)
        seconds = rng.uniform(1, 30) * train * train_cost
        fit = fit_budget(seconds, train, val, train_cost, val_cost, 30, 0.)
        assert fit.seconds <= 0.9 * seconds * (1 + 1e-5)
        assert fit.val_share * val * val_cost <= 0.3 * seconds * (1 + 1e-9)
        assert fit.epochs >= 10  # fewer images come before fewer epochs


@pytest.mark.parametrize('least', [0.02, 0.3, 1.])
@pytest.mark.parametrize('images,cost,val_cost', [(1000, 0.1, 0.5), (300, 2.03, 0.5), (100, 1e-3, 7.)])
def test_too_short(least, images, cost, val_cost):
    with pytest.raises(UserError, match='minutes are too short for one epoch') as caught:
        fit_budget(60 * min(1, least * images * cost / 61), images, 100, cost, val_cost, 10, least)
    minutes = float(str(caught.value).split('give ')[1])
    fit_budget(60 * minutes, images, 100, cost, val_cost, 10, least)  # what it says is enough
