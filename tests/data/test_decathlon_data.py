"""The Visual Decathlon's folders in small, and its score against the published tables."""
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.data import create_transform, resolve_data_config

from timm_amf.data import DataSpec, create_datasets, data_spec_from_args
from timm_amf.data.decathlon import DOMAINS, channel_stats, decathlon_score, domain_name, open_domain
from timm_amf.engine.config_file import find_config
from timm_amf.engine.options import parse_args
from timm_amf.errors import UserError

# SpotTune, Table 3: accuracies in the order of DOMAINS, the score, and how far it may lie from that of the accuracies.
# Three rows contradict themselves by more than a few points, and in one (the feature extractor) the accuracy on DTD is
# that of another row.
TABLE = {
    'Scratch': ('59.87 57.10 75.73 91.20 37.77 96.55 56.30 88.74 96.63 43.27', 1625, 2.5),
    'Feature Extractor': ('59.67 23.31 63.11 80.33 55.53 68.18 73.69 58.79 43.54 26.80', 544, 103),
    'Fine-tuning': ('60.32 61.87 82.12 92.82 55.53 99.42 81.41 89.12 96.55 51.20', 3096, 20),
    'Parallel adapters': ('60.32 64.21 81.92 94.73 58.83 99.38 84.68 89.21 96.54 50.94', 3412, 0.5),
    'Adapters, large': ('67.00 67.69 84.69 94.28 59.41 97.43 84.86 89.92 96.59 52.39', 3131, 0.5),
    'SpotTune, global-k': ('60.32 61.57 80.30 95.78 55.80 99.48 85.38 88.41 96.47 51.05', 3401, 10),
    'SpotTune': ('60.32 63.91 80.48 96.49 57.13 99.52 85.22 88.84 96.72 52.34', 3612, 0.5),
}


def by_domain(row):
    return dict(zip(DOMAINS, map(float, row.split()), strict=True))


@pytest.mark.parametrize('method', TABLE)
def test_score_of_the_published_rows(method):
    row, published, within = TABLE[method]
    assert decathlon_score(by_domain(row))[0] == pytest.approx(published, abs=within)


def test_score():
    baseline = {domain: about.baseline for domain, about in DOMAINS.items()}
    total, points = decathlon_score(baseline)
    assert total == pytest.approx(2500) and list(points) == list(DOMAINS)
    assert all(p == pytest.approx(250) for p in points.values())
    assert decathlon_score(dict.fromkeys(DOMAINS, 100))[0] == pytest.approx(10000)
    assert decathlon_score(dict.fromkeys(DOMAINS, 0))[0] == 0
    total, points = decathlon_score({'dtd': 57.13, 'GTSR': 99.52})
    errors = {'dtd': (1 - 0.5713, 2 * (1 - 0.5553)), 'gtsrb': (1 - 0.9952, 2 * (1 - 0.9753))}
    assert total == pytest.approx(sum(1000 * worst ** -2 * (worst - e) ** 2 for e, worst in errors.values()))
    assert domain_name('Airc.') == domain_name('airc') == domain_name('Aircraft') == 'aircraft'


@pytest.mark.parametrize('accuracies, message', [
    ({'mnist': 99}, "unknown domain 'mnist'"),
    ({'dtd': 101}, 'percentage'), ({'dtd': -1}, 'percentage'), ({'dtd': '57'}, 'percentage'),
    ({'dtd': True}, 'percentage'), ({'dtd': float('nan')}, 'percentage'),
    ({'dtd': 57, 'DTD': 58}, 'two accuracies of dtd'),
])
def test_score_of_nonsense(accuracies, message):
    with pytest.raises(UserError, match=message):
        decathlon_score(accuracies)


# ---- folders and annotation files

NAMES = ('Boeing', 'Airbus', 'Cessna')


def write_domain(root, domain='aircraft', names=NAMES, number=None, size=(90, 72), offset=10_000_000):
    """A domain whose files list images and categories in an order of their own."""
    number = number or {'train': 4, 'val': 2, 'test': 3}
    rng = np.random.default_rng(0)
    categories = [{'id': offset + i + 1, 'name': name, 'supercategory': domain} for i, name in enumerate(names)]
    serial = 0
    for split, count in number.items():
        images, annotations = [], []
        for i in range(count * len(names)):
            serial += 1
            kind = i % len(names)
            file = f'data/{domain}/{split}/{kind + 1:04}/{serial:06}.jpg'
            path = root / file
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 60, (size[1], size[0], 3)) + 70 * np.eye(3, dtype=int)[kind % 3] + 20
            Image.fromarray(pixels.astype(np.uint8)).save(path, quality=95)
            images.append({'id': offset + serial, 'file_name': file, 'width': size[0], 'height': size[1]})
            annotations.append({'id': serial, 'image_id': offset + serial, 'category_id': offset + kind + 1})
        content = {'images': images[::-1], 'annotations': annotations, 'categories': categories[::-1], 'type': 'x'}
        if split == 'test':
            content['annotations'] = []
        path = root / 'annotations' / f'{domain}_{split}{"_stripped" * (split == "test")}.json'
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return root


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    return write_domain(tmp_path_factory.mktemp('d') / 'decathlon-1.0')


@pytest.fixture
def root(written, tmp_path):
    return shutil.copytree(written, tmp_path / 'decathlon-1.0')


def test_reads_the_challenges_files(written):
    train = open_domain(str(written), 'aircraft', 'train')
    assert train.classes == ['Boeing', 'Airbus', 'Cessna'] and train.labelled
    assert train.category_ids == [10000001, 10000002, 10000003]
    assert train.image_ids == [10000000 + i for i in range(12, 0, -1)]  # the file's order
    assert train.targets.tolist() == [(i - 1) % 3 for i in range(12, 0, -1)]
    assert train.paths[0].endswith('data/aircraft/train/0003/000012.jpg')
    for i, target in enumerate(train.targets):  # the images really are those of their class
        assert np.asarray(train.load(i, 'RGB')).mean((0, 1)).argmax() == target
    assert len(open_domain(str(written), 'aircraft', 'val')) == 6
    test = open_domain(str(written), 'aircraft', 'test')
    assert len(test) == 9 and not test.labelled and set(test.targets.tolist()) == {-1}
    assert open_domain(str(written.parent), 'Airc.', 'valid').image_ids == [10000018 - i for i in range(6)]


def test_numbers_where_others_write_words(root):
    for path in (root / 'annotations').glob('*.json'):
        content = json.loads(path.read_text())
        for row in content['annotations']:
            row['category_id'] = float(row['category_id'])
        for digit, row in enumerate(content['categories']):
            row['name'] = digit
        path.write_text(json.dumps(content))
    val = open_domain(str(root), 'aircraft', 'val')
    assert val.classes == ['2', '1', '0'] and np.bincount(val.targets).tolist() == [2, 2, 2]


def test_as_a_mixture(root):
    spec = DataSpec.from_mapping({'dataset': 'decathlon/aircraft', 'root': str(root)})
    assert spec.components[0].name == 'aircraft'
    both, val = create_datasets(spec, ('train+val', 'val'))
    assert (len(both), len(val), both.num_classes) == (18, 6, 3)
    assert both.class_names == list(NAMES)
    assert val.class_counts().tolist() == [2, 2, 2]
    assert both.count_shared(val) == 6
    write_domain(root, 'dtd', ('dotted', 'Boeing'), offset=40_000_000)
    spec = DataSpec.from_mapping({'root': str(root), 'components': [
        {'dataset': 'decathlon/aircraft', 'name': 'a'}, {'dataset': 'decathlon/dtd', 'name': 'd', 'per_class': 1}]})
    train, = create_datasets(spec, ('train',))
    assert train.class_names == ['a/Boeing', 'Airbus', 'Cessna', 'dotted', 'd/Boeing']
    assert train.class_counts().tolist() == [4, 4, 4, 1, 1]


def test_test_has_no_labels_unless_a_file_has(root):
    spec = DataSpec.from_mapping({'dataset': 'decathlon/aircraft', 'root': str(root)})
    with pytest.raises(UserError, match='no labels.*decathlon submit'):
        create_datasets(spec, ('train', 'test'))
    content = json.loads((root / 'annotations/aircraft_test_stripped.json').read_text())
    content['annotations'] = [{'image_id': i['id'], 'category_id': 10000002} for i in content['images']]
    (root / 'annotations/aircraft_test.json').write_text(json.dumps(content))
    assert create_datasets(spec, ('train', 'test'))[1].targets.tolist() == [1] * 9


@pytest.mark.parametrize('change, message', [
    (lambda c: c.pop('annotations'), "'annotations'"),
    (lambda c: c.update(images=[]), 'no images'),
    (lambda c: c['images'][3].pop('file_name'), "'file_name'"),
    (lambda c: c['images'].append(7), 'TypeError'),
    (lambda c: c['images'][0].update(file_name='../../secret.jpg'), 'outside of the folder'),
    (lambda c: c['images'][0].update(file_name='/etc/secret.jpg'), 'outside of the folder'),
    (lambda c: c['annotations'].pop(), '10000012'),
    (lambda c: c['annotations'][0].update(category_id=5), ': 5'),
    ('{"images": [', 'JSONDecodeError'), ('[]', 'TypeError'), ('\udcff', 'UnicodeDecodeError'),
])
def test_a_damaged_file_is_one_line(root, change, message):
    path = root / 'annotations/aircraft_train.json'
    if isinstance(change, str):
        path.write_bytes(change.encode('utf-8', 'surrogateescape'))
    else:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f'not an annotation file.*{message}.*unpack it anew') as e:
        open_domain(str(root), 'aircraft', 'train')
    assert '\n' not in str(e.value) and str(path) in str(e.value)


@pytest.mark.parametrize('path, domain, split, message', [
    ('', 'aircraft', 'train', 'no folder'),
    ('{root}/data', 'aircraft', 'train', 'no folder annotations'),
    ('{root}', 'mnist', 'train', 'unknown domain'),
    ('{root}', 'aircraft', 'trial', 'no split'),
    ('{root}', 'dtd', 'train', 'dtd_train.json is missing'),
])
def test_what_is_not_there(root, path, domain, split, message):
    with pytest.raises(UserError, match=message):
        open_domain(path.format(root=root), domain, split)


def test_images_that_are_not_unpacked(root):
    shutil.rmtree(root / 'data' / 'aircraft' / 'train')
    with pytest.raises(UserError, match=r'unpack aircraft\.tar'):
        open_domain(str(root), 'aircraft', 'train')
    (root / 'annotations/aircraft_val.json').unlink()
    with pytest.raises(UserError, match='aircraft_val.json is missing'):
        open_domain(str(root), 'aircraft', 'val')


def test_statistics(root):
    source = open_domain(str(root), 'aircraft', 'train')
    pixels = np.stack([np.asarray(Image.open(path)) for path in source.paths]).reshape(-1, 3) / 255.
    mean, std = channel_stats(source)
    assert mean == pytest.approx(pixels.mean(0)) and std == pytest.approx(pixels.std(0))
    with open(source.paths[5], 'wb') as file:
        file.write(b'no image')
    with pytest.raises(UserError, match='cannot read image .*not an image'):
        channel_stats(source)


# ---- the page and the recipes

TARGETS = [domain for domain in DOMAINS if domain != 'imagenet12']
# SpotTune's, from its authors' code (github.com/gyhui14/spottune, main.py); the paper has none.
DECAYS = dict(zip(TARGETS, (5e-4, 0., 5e-4, 0., 0., 1e-4, 5e-4, 0., 5e-4), strict=True))
PAGE = (Path(__file__).parents[2] / 'docs' / 'decathlon.md').read_text(encoding='utf-8')


def test_the_pages_figures_and_example(written):
    row = next(line for line in PAGE.splitlines() if line.startswith('| 59.87'))
    assert by_domain(row.replace('|', ' ')) == {domain: about.baseline for domain, about in DOMAINS.items()}
    decays = re.findall(r'^\| (0[.\d]*) \| ([\w, -]+) \|$', PAGE, re.MULTILINE)
    told = {domain: float(decay) for decay, domains in decays for domain in domains.split(', ')}
    assert {domain: told[domain] for domain in TARGETS} == DECAYS
    section = yaml.safe_load(re.search(r'```yaml\n(.*?)```', PAGE, re.DOTALL)[1])['data']
    spec = DataSpec.from_mapping({**section, 'root': str(written)})
    assert create_datasets(spec, ('train',))[0].components == ['aircraft']



@pytest.mark.parametrize('domain', TARGETS)
def test_recipes(domain, tmp_path):
    path = find_config(f'spottune_resnet26.decathlon_{domain}')
    args = parse_args(['--config', str(path), '--data-dir', str(tmp_path)])
    plan = args.recipe['plan']
    assert (plan['lr'], plan['epochs'], plan['opt'], args.batch_size) == (0.1, 110, 'momentum', 128)
    assert plan['weight_decay'] == DECAYS[domain]
    expected = yaml.safe_load(path.read_text(encoding='utf-8'))['expected']
    assert expected['top1']['mean'] == by_domain(TABLE['SpotTune'][0])[domain]
    assert data_spec_from_args(args).components[0].dataset == f'decathlon/{domain}'
    assert args.eval_sampling_seed == 0  # section 3.1: the decisions are sampled at test time, too


def test_the_networks_of_a_recipe_see_images_normalised_by_the_domain():
    """And not again by what they were trained with."""
    args = parse_args([
        '--config', 'spottune_resnet26.decathlon_svhn', '--data-dir', '.', '--backbone-weights', 'resnet26.pth'])
    assert args.model_kwargs['backbone_kwargs']['pretrained_cfg_overlay']['file'] == 'resnet26.pth'
    with torch.device('meta'):
        model = timm.create_model(args.model, num_classes=10, **args.model_kwargs)
    config = resolve_data_config(vars(args), model=model)
    assert config['mean'] == pytest.approx((0.4377, 0.4438, 0.4728)) and config['std'][0] == pytest.approx(0.198)
    assert isinstance(model.renorm, torch.nn.Identity) and isinstance(model.policy.renorm, torch.nn.Identity)


def test_random_crop_of_a_square_image():
    """With these flags timm's random resized crop is a plain crop of 64 pixels, at any place."""
    args = parse_args(['--config', 'spottune_resnet26.decathlon_cifar100', '--data-dir', '.'])
    crop = create_transform(64, is_training=True, scale=args.scale, ratio=args.ratio, interpolation='bilinear',
                            train_crop_mode=args.train_crop_mode).transforms[0]
    row, column = np.mgrid[:72, :72].astype(np.uint8)
    image = Image.fromarray(np.stack([row, column, row], axis=2))
    corners = set()
    for _ in range(200):
        pixels = np.asarray(crop(image)).astype(int)
        top, left = pixels[0, 0, 0], pixels[0, 0, 1]
        assert (pixels[:, :, 0] == top + np.arange(64)[:, None]).all()
        assert (pixels[:, :, 1] == left + np.arange(64)).all()
        corners.add((top, left))
    assert len(corners) > 50 and {c for pair in corners for c in pair} == set(range(9))
