"""Stochastic fine-tuning: blocks drawn from the seed alone."""
import os
import subprocess
import sys

import pytest
import timm
import torch

from timm_amf import Plan, UserError, list_blocks, param_groups
from timm_amf.tuning import describe_depths
from timm_amf.tuning.resolve import resolve

SCRIPT = '''
import timm, torch, random, numpy
from timm_amf import Plan
from timm_amf.tuning.resolve import resolve
random.seed(); numpy.random.seed(None); torch.manual_seed(torch.seed() % 2**32)
with torch.device('meta'):
    model = timm.create_model('resnet50')
print(*sorted(resolve(model, Plan(roles=dict(backbone=dict(train='random', train_seed=3)))).roles['backbone'].training))
'''


def build(name, **kwargs):
    with torch.device('meta'):
        return timm.create_model(name, **kwargs)


def random_plan(role='backbone', **settings):
    return Plan(roles={role: dict(train='random', **settings)})


def drawn(model, **settings):
    training = resolve(model, random_plan(**settings)).roles['backbone'].training
    assert 'tail' in training and 'stem' not in training
    return [b for b in list_blocks(model) if b in training]


@pytest.mark.parametrize('name, share, count', [
    ('resnet50', 0.5, 8), ('resnet18', 0.5, 4), ('vit_tiny_patch16_224', 0.25, 3), ('resnet50', 1., 16),
    ('resnet50', 0.01, 1), ('mobilenetv2_100', 0.5, 9),  # 17 blocks: 8.5 is rounded up
])
def test_the_share(name, share, count):
    assert len(drawn(build(name), train_share=share)) == count


def test_only_what_is_drawn_trains():
    model = build('efficientnet_b0', num_classes=3)
    blocks = drawn(model)
    names = {n for g in param_groups(model, random_plan()) for n in g['param_names']}
    expected = tuple(f'{b}.' for b in blocks) + ('conv_head.', 'bn2.', 'classifier.')
    assert names == {n for n, _ in model.named_parameters() if n.startswith(expected)}


def test_the_draw_is_uniform_over_seeds_and_differs_between_them():
    model = build('resnet18')
    draws = [tuple(drawn(model, train_seed=seed)) for seed in range(200)]
    assert len(set(draws)) > 50  # of 70
    for block in list_blocks(model):
        assert 70 <= sum(block in d for d in draws) <= 130  # 100 expected, standard deviation 7


def test_another_process_draws_the_same():
    out = subprocess.run(
        [sys.executable, '-c', SCRIPT], capture_output=True, text=True, check=True,
        env={**os.environ, 'PYTHONHASHSEED': '1'}).stdout.split()
    assert out == sorted([*drawn(build('resnet50'), train_seed=3), 'tail'])


def test_the_log_says_which():
    model = build('amf', backbones=('resnet18', 'resnet18'), policy='test_resnet')
    plan = Plan(roles={
        'branch.0': dict(train='random', train_seed=7, train_share=0.25),
        'branch.1': dict(reinit_blocks=2, l2sp_alpha=0.01),
    })
    lines = describe_depths(model, plan).splitlines()
    blocks = [b for b in list_blocks(model) if b in resolve(model, plan).roles['branch.0'].training]
    assert len(blocks) == 2 and ', '.join(blocks) in lines[0] and 'seed 7' in lines[0]
    assert 'branches.1.layer4.0, branches.1.layer4.1' in lines[1]
    assert 'alpha 0.01' in lines[2] and '6 of 8' in lines[2]
    assert describe_depths(model, Plan()) == ''


def test_nothing_to_draw_from():
    with pytest.raises(UserError, match='head has no blocks'):
        param_groups(build('resnet18'), random_plan('head'))
    for bad in (dict(train_share=0), dict(train_share=1.5), dict(train='some'), dict(l2sp_blocks='most')):
        with pytest.raises(UserError):
            random_plan(**bad) if 'train' not in bad else Plan(roles=dict(backbone=bad))
