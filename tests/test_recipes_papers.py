"""What the recipes of the non-binary paper and of SpotTune's Table 2 do to each layer, and what they promise."""
import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest
import timm
import torch
from test_recipes import meta_model

from timm_amf.cli import main
from timm_amf.engine.config_file import list_recipes
from timm_amf.engine.options import parse_args
from timm_amf.engine.recipes import read_recipe
from timm_amf.search.candidates import Traced
from timm_amf.tuning import model_roles, plan_from_args
from timm_amf.tuning.plan_args import resolve_lr
from timm_amf.tuning.resolve import resolve

sys.path.insert(0, str(Path(__file__).parent / 'engine'))
from conftest_engine import reset_accelerate  # noqa: E402

# Table 6: LR of the low layers, of the high ones and of the classifier; layers that are low, pulled and new; alpha,
# beta; mean and ensemble. None: the setting is not used, or the paper does not give it.
TABLE_6 = {
    'caltech256_30_default': (None, 0.0025, 0.0025, 0, 0, 0, None, None, 83.69, None),
    'caltech256_30_optimal': (None, 0.0025, 0.0025, 0, 22, 0, 0.01, 0.01, 84.52, 85.94),
    'cars_default': (None, 0.025, 0.025, 0, 0, 0, None, None, 94.59, None),
    'cars_optimal': (0.01, 0.025, 0.025, 8, 0, 0, None, None, 94.86, 95.35),
    'aircraft_default': (None, 0.025, 0.025, 0, 0, 0, None, None, 93.78, None),
    'aircraft_optimal': (0.01, 0.025, 0.01, 8, 0, 2, None, None, 94.50, 95.11),
    'dtd_default': (None, 0.002, 0.002, 0, 0, 0, None, None, 77.30, None),
    'dtd_optimal': (None, 0.002, 0.002, 0, 14, 1, 0.001, 0.001, 78.90, 79.79),
}
# Table 2, CUBS: which blocks of the 16 train.
TABLE_2 = {
    'resnet50.cub_feature_extractor': (0, 74.07),
    'resnet50.cub_standard': (16, 81.86),
    'resnet50.cub_stochastic': (8, 81.03),
    'resnet50.cub_last3': (3, 81.54),
    'resnet50.cub_last2': (2, 80.34),
    'resnet50.cub_last1': (1, 78.68),
    'resnet101.cub_standard': (33, 82.13),
    'resnet50.cub_l2sp': (16, 83.69),
}
SPOTTUNE = {
    'cub': 84.03, 'cars': 92.40, 'flowers': 96.34, 'wikiart': 75.77, 'sketches': 80.20, 'cub_tuned_blocks': 82.36,
    'cub_global_k': 83.48,
}


def read(name):
    args = parse_args(['--config', name, '--data-dir', '.'])
    model = meta_model(args)
    plan = plan_from_args(args, model_roles(model), 1.)
    return args, model, plan, resolve(model, plan).parameters


@pytest.mark.parametrize('name', TABLE_6)
def test_table_6(name):
    low, high, head, low_layers, pulled, new, alpha, beta, mean, ensemble = TABLE_6[name]
    args, model, plan, found = read(f'inception_v4.{name}')
    anew = {n.rsplit('.', 1)[0] for n in resolve(model, plan).reinitialised}
    parameters = dict(model.named_parameters())
    for parameter, setting in found.items():
        kernel = parameters[parameter].ndim > 1
        if parameter.startswith('last_linear'):
            assert setting.lr == head
            assert not kernel or setting.weight_decay == (beta or 5e-4)
            continue
        layer = int(parameter.split('.')[1])
        assert setting.lr == pytest.approx(low if layer < low_layers else high)
        assert (parameter.rsplit('.', 1)[0] in anew) == (layer >= 22 - new)
        if kernel:
            assert (setting.l2sp_alpha or None) == (alpha if layer < pulled else None)
            assert setting.weight_decay == (0. if layer < pulled else beta or 5e-4)
    assert args.img_size == 299 and args.batch_size == 32
    # The command of the authors' README, and the defaults of their script.
    assert plan.epochs == 800 and (plan.opt, plan.momentum, args.smoothing) == ('sgd', 0.9, 0.1)
    schedule = plan.schedule
    assert (schedule.sched, schedule.decay_rate, schedule.decay_epochs, schedule.warmup_epochs) == ('step', 0.9, 10, 3)
    assert schedule.warmup_scale * plan.lr == pytest.approx(1e-4)
    assert (args.mixup, args.aa, args.reprob, args.remode) == (0.2, 'rand-m9-mstd0.5-inc1', 0.5, 'pixel')
    expected = args.recipe['expected']
    assert expected['top1']['mean'] == mean and expected.get('top1_ensemble', {}).get('mean') == ensemble


@pytest.mark.parametrize('name', TABLE_2)
def test_table_2(name):
    blocks, mean = TABLE_2[name]
    args, model, plan, found = read(name)
    assert len({s.place.block for s in found.values() if s.trains and s.place.block.startswith('layer')}) == blocks
    assert found['fc.weight'].trains and found['fc.weight'].lr == 0.01
    assert found['conv1.weight'].trains == (blocks in (16, 33))
    assert (found['conv1.weight'].l2sp_alpha or 0.) == (0.1 if name.endswith('l2sp') else 0.)
    assert found['fc.weight'].weight_decay == (0.01 if name.endswith('l2sp') else 1e-4)
    if 'last' in name:
        assert all(found[f'layer4.{i}.conv1.weight'].trains == (i >= 3 - blocks) for i in range(3))
    check_setting_of_section_4(args, plan, mean)


@pytest.mark.parametrize('name', SPOTTUNE)
def test_spottune(name):
    args, model, plan, found = read(f'spottune_resnet50.{name}')
    lrs = {s.place.role: s.lr for s in found.values() if s.trains}
    assert lrs == {'tuned': 0.01, 'head': 0.01, 'policy': 1e-4}
    assert model.temperature == 5 and len(model.blocks_tuned) == 16
    assert (args.eval_blocks == 'tuned') == name.endswith('tuned_blocks')
    # Section 3.1: sampled at test time, too, unless one path is for all images.
    assert args.eval_sampling_seed == (None if name.endswith(('global_k', 'tuned_blocks')) else 0)
    assert plan.global_k == (3 if name.endswith('global_k') else None)
    assert plan.global_k_weights == [3, 3] and plan.global_k_window == 100  # ours: docs/spottune.md
    assert model.pretrained_cfg['hf_hub_id'] == 'timm/resnet50.tv_in1k' and model.pretrained_cfg['crop_pct'] == 0.875
    check_setting_of_section_4(args, plan, SPOTTUNE[name])


def check_setting_of_section_4(args, plan, mean):
    assert (plan.epochs, plan.momentum, args.batch_size) == (40, 0.9, 32)
    assert plan.schedule.decay_milestones == [15, 30] and plan.schedule.decay_rate == 0.1
    assert args.recipe['expected']['top1'] == {'mean': mean} and args.recipe['expected']['split'] == 'test'


# Block-wise paper, Table I: baselines I and II, LW, BW, BWT3, BWT5 and BWSW.
TABLE_I = {
    'vgg16': (0.713896, 0.873751, 0.864668, 0.875568, 0.86921, 0.881926, 0.877384),
    'mobilenetv1_100': (0.828338, 0.875568, 0.847411, 0.877389, 0.875568, 0.883742, 0.879201),
    'mobilenetv2_100': (0.811081, 0.86921, 0.823797, 0.867393, 0.833787, 0.86921, 0.839237),
    'mobilenetv3_small_100': (0.30881, 0.762035, 0.438692, 0.790191, 0.516803, 0.648501, 0.667575),
    'resnetv2_50': (0.778383, 0.828338, 0.857402, 0.848320, 0.86921, 0.868302, 0.849228),
}
TF_FLOWERS = (633, 898, 641, 699, 799)


def script(name):
    path = Path(__file__).parents[1] / f'benchmarks/{name}.py'
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def protocol():
    return script('blockwise_protocol')


def test_table_i_is_of_1101_images(protocol, tmp_path):
    """The accuracies of the paper are shares of the images on which the protocol validates: 30 % of tf_flowers."""
    for i, count in enumerate(TF_FLOWERS):
        for k in range(count):
            folder = tmp_path / 'flowers' / f'c{i}'
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f'{k}.jpg').touch()
    protocol.split(tmp_path / 'flowers', tmp_path / 'parts', 0)
    counts = {part: len(list((tmp_path / 'parts' / part).rglob('*.jpg'))) for part in ('train', 'val')}
    assert counts == {'train': 2569, 'val': 1101}
    off = [abs(a * 1101 - round(a * 1101)) / 1101 for row in TABLE_I.values() for a in row]
    assert len(off) == 35 and max(off) < 5e-6
    # 10 % of all for the search, which lie in the 70 % that its winners are trained on.
    assert protocol.OPTIONS['search_share'] * counts['train'] == pytest.approx(0.1 * 3670, abs=1)
    assert protocol.OPTIONS['final_share'] == 1


def test_blocks_of_the_blockwise_paper(protocol):
    """Five blocks of a VGG, a convolution and its norm each of MobileNetV1 (section III-B)."""
    assert {m: protocol.cut_of(m) for m in ('vgg16', 'mobilenetv1_100', 'mobilenetv2_100', 'resnetv2_50')} == {
        'vgg16': 'pooling', 'mobilenetv1_100': 'activation', 'mobilenetv2_100': 'activation',
        'resnetv2_50': 'activation'}
    found = {}
    for name in ('vgg16', 'mobilenetv1_100'):
        with torch.device('meta'):
            model = timm.create_model(name)
        found[name] = Traced(model, (3, 64, 64), features_only=True).blocks(cut=protocol.cut_of(name))
    assert [len(c.modules) for c in found['vgg16']] == [2, 2, 3, 3, 3]
    assert len(found['mobilenetv1_100']) == 27
    assert protocol.OPTIONS['separate_norms'] and protocol.OPTIONS['search_head'] == 'mlp'


@pytest.mark.parametrize('name', TABLE_I)
def test_blockwise_figures(name):
    recipe = read_recipe(f'{name}.tf_flowers')
    if 'mobilenetv3' in name:  # of inputs scaled twice
        assert not recipe['expected']
        return
    ways = ('classifier', 'all', 'layer', 'block', 'top3', 'top5', 'window')
    found = [recipe['expected'][f'top1_{way}'] for way in ways]
    assert found == [{'mean': round(100 * value, 2)} for value in TABLE_I[name]]
    assert recipe['model'].split('.')[0] == name


@pytest.mark.parametrize('name', TABLE_I)
def test_blockwise_settings(name):
    """Section V, and where its text has nothing what the search's own protocol takes."""
    args = parse_args(['--config', f'{name}.tf_flowers', '--data-dir', '.'])
    plan, data = args.recipe['plan'], args.recipe['data']
    assert 5 * data['per_class']['val'] == 5 * data['skip']['train'] == pytest.approx(0.3 * 3670, abs=1)
    assert (plan['opt'], plan['lr'], plan['weight_decay'], plan['epochs']) == ('adam', 1e-4, 0, 50)
    assert plan['schedule'] == dict(sched='plateau', patience_epochs=10, decay_rate=0.1, warmup_epochs=0)
    assert (args.batch_size, args.no_aug, args.smoothing, args.pretrained) == (4, True, 0, True)


PAPERS_PAGE = (Path(__file__).parents[1] / 'docs/papers.md').read_text(encoding='utf-8')
ROWS = script('paper_rows')


@pytest.mark.parametrize('command', [c for c in ROWS.commands() if c.startswith('timm-amf train')])
def test_the_command_of_a_row(command):
    """It is one of train_amf.py, and its Plan fits its model."""
    args = parse_args(ROWS.without(shlex.split(command)[2:], ['--backbone-weights', '--pretrained-path']))
    model = meta_model(args)
    plan = plan_from_args(args, model_roles(model), resolve_lr(args, args.batch_size))
    assert any(setting.trains for setting in resolve(model, plan).parameters.values())


@pytest.mark.parametrize('paper, tables, figures', [
    ('AMF', 3, 7), ('SpotTune', 3, 5), ('Non-binary', 7, 6), ('Block-wise', 1, 8)])
def test_every_table_and_figure_has_a_row(paper, tables, figures):
    section = next(part for part in PAPERS_PAGE.split('\n## ') if part.startswith(paper))
    named = set(re.findall(r'(?:Table|Figure) \w+', section))
    for first, joint, last in re.findall(r'Figures (\d+) (and|to) (\d+)', section):
        numbers = range(int(first), int(last) + 1) if joint == 'to' else (first, last)
        named |= {f'Figure {number}' for number in numbers}
    roman = ('I', 'II', 'III') if paper in ('AMF', 'Block-wise') else ('1', '2', '3', '4', '5', '6', '7')
    assert not {f'Table {number}' for number in roman[:tables]} - named
    assert not {f'Figure {number}' for number in range(1, figures + 1)} - named


def test_a_row_of_the_page_runs(tmp_path, monkeypatch):
    """The smallest networks; `python benchmarks/paper_rows.py` runs all."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    command = next(c for c in ROWS.commands() if 'decathlon_aircraft' in c)
    _, _, *words = ROWS.smoke_words(command, tmp_path)  # without `-m timm_amf.cli`
    reset_accelerate()
    assert main(words) == 0
    reset_accelerate()


@pytest.mark.slow
def test_all_rows_of_the_page_run():
    found = list(ROWS.run(ROWS.commands()))
    assert len(found) > 50 and not [row for row in found if row[1] == 'failed']


def test_none_is_forgotten():
    ours = {f'inception_v4.{n}' for n in TABLE_6} | set(TABLE_2) | {f'spottune_resnet50.{n}' for n in SPOTTUNE}
    assert ours <= set(list_recipes())
