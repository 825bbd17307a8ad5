"""The Visual Decathlon from training to the file for its server."""
import json
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from timm_amf.cli import main
from timm_amf.engine.opened import RunOptions
from timm_amf.engine.submission import predict_run, write_results
from timm_amf.errors import UserError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'data'))

from test_decathlon_data import TABLE, by_domain, write_domain  # noqa: E402

FLAGS = [
    '--model', 'resnet8_decathlon', '--img-size', '32', '-b', '8', '--epochs', '2', '--workers', '0', '--lr', '0.05',
    '--warmup-epochs', '0', '--cpu', '--tracker', 'none', '--smoothing', '0', '--model-kwargs', 'channels=(8,8,8)',
    'stem_chs=4', '--mean', '0.4', '0.3', '0.3', '--std', '0.2', '--crop-pct', '0.8',
]


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp('d') / 'decathlon-1.0'
    write_domain(root, number={'train': 8, 'val': 3, 'test': 5}, size=(50, 40))
    write_domain(root, 'dtd', ('dotted', 'woven'), {'train': 8, 'val': 3, 'test': 4}, (40, 40), offset=40_000_000)
    return root


@pytest.fixture
def train(run, data):
    def _train(domain: str, *flags: str) -> Path:
        where = ['--dataset', f'decathlon/{domain}', '--data-dir', str(data)]
        return run(domain, *flags, base=FLAGS, data=where)
    return _train


def expected(folder: Path, paths: list[Path], weights: str = 'model_best.safetensors') -> list[int]:
    """The classes that the run's network predicts, one image after the other and without this package's data."""
    state = load_file(folder / weights)
    model = timm.create_model(
        'resnet8_decathlon', num_classes=len(state['fc.bias']), channels=(8, 8, 8), stem_chs=4).eval()
    model.load_state_dict(state)
    classes = []
    for path in paths:
        image = Image.open(path)
        side = (int(40 * image.width / image.height), 40)  # 32 / 0.8
        image = image.resize(side, Image.Resampling.BILINEAR)
        left, top = round((image.width - 32) / 2), round((image.height - 32) / 2)
        pixels = torch.from_numpy(np.array(image.crop((left, top, left + 32, top + 32)))).permute(2, 0, 1) / 255
        pixels = (pixels - torch.tensor([0.4, 0.3, 0.3]).view(3, 1, 1)) / 0.2
        with torch.no_grad():
            classes.append(int(model(pixels[None]).argmax()))
    return classes


def test_two_runs_to_one_file(train, data, tmp_path, capsys):
    runs = [train('aircraft'), train('dtd')]
    out = tmp_path / 'results.json'
    assert main(['decathlon', 'submit', *map(str, runs), '--data-dir', str(data), '--out', str(out), '--cpu']) == 0
    rows = json.loads(out.read_text())
    wanted = []
    for run, domain, offset in ((runs[0], 'aircraft', 10_000_000), (runs[1], 'dtd', 40_000_000)):
        images = json.loads((data / f'annotations/{domain}_test_stripped.json').read_text())['images']
        classes = expected(run, [data / image['file_name'] for image in images])
        assert len(set(classes)) > 1  # a constant answer would match anything
        wanted += [{'image_id': i['id'], 'category_id': offset + 1 + c} for i, c in zip(images, classes)]
    assert rows == wanted and len(rows) == 15 + 8
    text = capsys.readouterr().out
    assert 'aircraft: 15 images\n' in text and '23 predictions of 2 domains, without imagenet12, cifar100' in text

    out = tmp_path / 'val.zip'
    assert main(['decathlon', 'submit', str(runs[0]), '--out', str(out), '--split', 'val', '--cpu']) == 0
    with zipfile.ZipFile(out) as archive:
        rows = {row['image_id']: row['category_id'] for row in json.loads(archive.read('results.json'))}
    content = json.loads((data / 'annotations/aircraft_val.json').read_text())
    right = np.mean([rows[a['image_id']] == a['category_id'] for a in content['annotations']])
    assert f'aircraft: 9 images, top-1 {100 * right:.2f} %' in capsys.readouterr().out
    with open(runs[0] / 'summary.csv') as file:  # training's own evaluation says the same of its best epoch
        lines = [line.split(',') for line in file.read().splitlines()]
    top1 = max(float(line[lines[0].index('eval_top1')]) for line in lines[1:])
    assert top1 == pytest.approx(100 * right, abs=1e-3)


def test_last_weights_and_a_run_that_moved(train, data, tmp_path):
    run = train('aircraft', '--model-ema', '--model-ema-decay', '0.5', '--train-split', 'train+val')
    moved = shutil.move(run, tmp_path / 'elsewhere')
    options = yaml.safe_load((moved / 'args.yaml').read_text())
    options['initial_checkpoint'] = str(tmp_path / 'gone.safetensors')  # what it began from is not needed any more
    (moved / 'args.yaml').write_text(yaml.safe_dump(options))
    images = json.loads((data / 'annotations/aircraft_test_stripped.json').read_text())['images']
    paths = [data / image['file_name'] for image in images]
    for weights, file in (('last', 'last/ema.safetensors'), ('best', 'model_best.safetensors')):
        domain, got, accuracy = predict_run(
            moved, 'test', RunOptions(data_dir=str(data), weights=weights, cpu=True, batch_size=4))
        assert [row['category_id'] for row in got] == [10_000_001 + c for c in expected(moved, paths, file)]
        assert [row['image_id'] for row in got] == [image['id'] for image in images]
        assert domain == 'aircraft' and accuracy is None
    (moved / 'last/ema.safetensors').unlink()
    with pytest.raises(UserError, match='ema.safetensors: is not there'):
        predict_run(moved, 'test', RunOptions(data_dir=str(data), weights='last', cpu=True))
    (moved / 'last/digests.json').unlink()  # as of a run of an older version
    _, got, _ = predict_run(moved, 'test', RunOptions(data_dir=str(data), weights='last', cpu=True))
    wanted = expected(moved, paths, 'last/model.safetensors')
    assert [row['category_id'] for row in got] == [10_000_001 + c for c in wanted]


def test_what_cannot_be_submitted(train, data, tmp_path, capsys):
    run = train('dtd', '--epochs', '1')
    assert main(['decathlon', 'submit', str(run), str(run), '--cpu', '--out', str(tmp_path / 'r.json')]) == 2
    assert capsys.readouterr().err == 'timm-amf decathlon: error: decathlon: two runs of dtd; give one run a domain\n'
    with pytest.raises(UserError, match='no args.yaml there'):
        predict_run(tmp_path)
    with pytest.raises(UserError, match='cannot be written'):
        write_results([dict(image_id=1, category_id=2)], tmp_path)
    with pytest.raises(UserError, match='no folder annotations'):
        predict_run(run, 'test', RunOptions(data_dir=str(tmp_path)))
    options = yaml.safe_load((run / 'args.yaml').read_text())
    for changed, message in (
            (dict(dataset='', data_dir=str(tmp_path)), 'not on one domain'),
            (dict(component=['dataset=decathlon/dtd,classes=1']), 'first 1 classes only')):
        (run / 'args.yaml').write_text(yaml.safe_dump({**options, **changed}))
        with pytest.raises(UserError, match=message):
            predict_run(run)
    (run / 'args.yaml').write_text(yaml.safe_dump(options))
    (run / 'model_best.safetensors').unlink()
    with pytest.raises(UserError, match='no such checkpoint'):
        predict_run(run)


def test_score_on_the_command_line(tmp_path, capsys):
    row = by_domain(TABLE['SpotTune'][0])
    half = dict(list(row.items())[:5])
    (tmp_path / 'half.yaml').write_text(yaml.safe_dump(half))
    rest = [f'{name}={value}' for name, value in row.items() if name not in half]
    assert main(['decathlon', 'score', str(tmp_path / 'half.yaml'), *rest]) == 0
    last = capsys.readouterr().out.splitlines()[-1].split()
    assert last == ['score', '3612.2', 'of', '10000']
    assert main(['decathlon', 'score', 'DTD=57.13']) == 0
    assert 'without imagenet12, aircraft' in capsys.readouterr().out
    for words, message in (
            (['dtd=57', 'DTD=58'], 'two accuracies of dtd'),
            (['dtd=high'], "'high' is not a number"),
            (['nothing.yaml'], 'nothing.yaml: cannot be read'),
            (['mnist=99'], "unknown domain 'mnist'")):
        assert main(['decathlon', 'score', *words]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / 'list.yaml').write_text('[1, 2]')
    assert main(['decathlon', 'score', str(tmp_path / 'list.yaml')]) == 2
    assert 'must hold keys and values' in capsys.readouterr().err


def test_statistics_on_the_command_line(data, tmp_path, capsys):
    assert main(['decathlon', 'stats', 'dtd', '--data-dir', str(data)]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    pixels = [np.asarray(Image.open(path)) / 255 for path in (data / 'data/dtd/train').rglob('*.jpg')]
    assert printed['mean'] == pytest.approx(np.mean(pixels, (0, 1, 2)).tolist(), abs=1e-4)
    assert printed['std'] == pytest.approx(np.std(pixels, (0, 1, 2)).tolist(), abs=1e-4)
    assert main(['decathlon', 'stats', 'svhn', '--data-dir', str(data)]) == 2
    assert 'svhn_train.json is missing' in capsys.readouterr().err
