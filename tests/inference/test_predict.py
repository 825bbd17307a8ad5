"""Predictions: the numbers of an evaluation, a row for a damaged image, a stream, and every kind of source."""
import csv
import json
import math
import os
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision import transforms

import timm_amf
from timm_amf.cli import main
from timm_amf.data.sources import FileSource
from timm_amf.engine.opened import RunOptions
from timm_amf.errors import UserError
from timm_amf.inference.predict import Prediction

CLASSES = ['stripes/class0', 'stripes/class1', 'class2', 'blobs/class0', 'blobs/class1']
CPU = RunOptions(cpu=True, workers=0)


def rows(path):
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


def files(folders, component='stripes'):
    return sorted(str(path) for path in (folders / component / 'val').rglob('*.png'))


@pytest.mark.parametrize('kind', ['plain', 'amf', 'spottune'])
@pytest.mark.parametrize('crops', [[], ['--ten-crop']])
def test_predict_gives_the_bits_of_evaluate(runs, kind, crops, tmp_path, capsys):
    run = str(runs[kind])
    evaluated, predicted = tmp_path / 'e.csv', tmp_path / 'p.csv'
    flags = ['--cpu', '-b', '10', '--crop-pct', '0.8', *crops]
    assert main(['evaluate', run, '--predictions', str(evaluated), *flags]) == 0
    expected = rows(evaluated)
    assert len(expected) == 25 and {row['run'] for row in expected} == {run}
    paths = [row['path'] for row in expected]
    assert main(['predict', run, *paths, '--topk', '5', '--output', str(predicted), *flags]) == 0
    found = rows(predicted)
    assert [row['filename'] for row in found] == paths
    decided = {'plain': [], 'amf': ['weight_0', 'weight_1'], 'spottune': ['block_0', 'probability_0']}[kind]
    for one, two in zip(expected, found):
        same = [name for name in two if name not in ('filename', 'error')]
        assert {f'{kind}_{i}' for kind in ('label', 'prob') for i in range(5)} | set(decided) <= set(same)
        assert [one[name] for name in same] == [two[name] for name in same]
        assert one['label'].rpartition('/')[2] == os.path.basename(os.path.dirname(one['path']))
        assert one['component'] in one['path'] and not two['error']
        assert sum(float(one[f'prob_{i}']) for i in range(5)) == pytest.approx(1, abs=1e-6)
        if decided and kind == 'amf':
            assert float(one['weight_0']) + float(one['weight_1']) == pytest.approx(1, abs=1e-6)
    out, err = capsys.readouterr()
    assert out.endswith('p.csv: 25 images\n') and 'could not be read' not in err


def test_decisions_against_a_loop(runs, folders):
    """Image by image, by torchvision and the model alone; over ten crops the means."""
    for kind, ten_crop in (('amf', False), ('amf', True), ('spottune', False), ('spottune', True)):
        model = timm_amf.load(runs[kind])
        cfg = model.pretrained_cfg
        crop = transforms.TenCrop(32) if ten_crop else transforms.Compose(
            [transforms.CenterCrop(32), lambda image: [image]])
        resize = transforms.Resize(int(32 / cfg['crop_pct']), transforms.InterpolationMode(cfg['interpolation']))
        last = transforms.Compose([transforms.ToTensor(), transforms.Normalize(cfg['mean'], cfg['std'])])
        paths = files(folders)[:4]
        found = list(timm_amf.predict(runs[kind], paths, 5, RunOptions(cpu=True, ten_crop=ten_crop)))
        for path, got in zip(paths, found, strict=True):
            x = torch.stack([last(c) for c in crop(resize(Image.open(path).convert('RGB')))])
            with torch.no_grad():
                p = model(x).double().softmax(1).mean(0)
                policy = model.forward_policy(x)
            assert got.labels == [CLASSES[i] for i in p.argsort(descending=True)]
            assert got.probabilities == pytest.approx(sorted(p.tolist(), reverse=True), rel=1e-4)
            if kind == 'amf':
                wanted = {f'weight_{i}': w for i, w in enumerate(policy.mean(0).tolist())}
            else:
                tuned = (policy[..., 1] > policy[..., 0]).float().mean(0).tolist()
                likely = policy.softmax(-1)[..., 1].mean(0).tolist()
                wanted = {f'block_{i}': t for i, t in enumerate(tuned)}
                wanted.update({f'probability_{i}': t for i, t in enumerate(likely)})
            assert list(got.decisions) == list(wanted)
            assert list(got.decisions.values()) == pytest.approx(list(wanted.values()), rel=1e-3, abs=1e-6)


def test_a_damaged_image_is_a_row(runs, folders, tmp_path, capsys, caplog):
    folder = tmp_path / 'photos'
    (folder / 'inner').mkdir(parents=True)
    good = files(folders)[:5]
    for i, path in enumerate(good):
        Image.open(path).save(folder / f'{i + 8}.png')  # natural order: 8, 9, 10, ...
    whole = (folder / '9.png').read_bytes()
    (folder / '1.png').write_bytes(whole[:len(whole) // 2])
    (folder / 'inner/text.jpg').write_text('no image')
    (folder / 'notes.txt').write_text('left out')
    (folder / '.hidden.png').write_text('left out, too')
    words = ['predict', str(runs['amf']), str(folder), '--cpu', '-b', '2', '--format']
    for workers in ('0', '1'):
        assert main([*words, 'csv', '-j', workers]) == 3
        out, err = capsys.readouterr()
        table = list(csv.DictReader(out.splitlines()))
        assert [os.path.relpath(row['filename'], folder) for row in table] == [
            '1.png', '8.png', '9.png', '10.png', '11.png', '12.png', 'inner/text.jpg']
        assert list(table[0]) == ['filename', 'label', 'prob', 'weight_0', 'weight_1', 'error']
        assert 'truncated' in table[0]['error'] and table[-1]['error'] == 'not an image'
        assert not any(table[0][name] for name in ('label', 'prob', 'weight_0'))
        alone = timm_amf.predict(runs['amf'], good, 1, RunOptions(cpu=True))
        for row, p in zip(table[1:-1], alone, strict=True):
            assert row['label'] == p.labels[0] and float(row['prob']) == pytest.approx(p.probabilities[0], rel=1e-4)
        assert '2 of 7 images could not be read' in err
    assert '2 files left out that are not .jpeg, .jpg, .png' in caplog.text
    assert main([*words, 'json']) == 3
    records = json.loads(capsys.readouterr().out)
    assert records[0]['prob'] is None and records[-1]['error'] == 'not an image'
    assert [record['filename'] for record in records] == [row['filename'] for row in table]
    assert main([*words, 'table', '--topk', '2']) == 3
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith('text.jpg  cannot be read: not an image') and 'weight 0.' in lines[1]
    bad, = timm_amf.predict(runs['plain'], folder / '1.png', 2)
    assert bad.labels == ['', ''] and all(map(math.isnan, bad.probabilities)) and 'truncated' in bad.error


def test_a_folder_streams(runs, folders, tmp_path, monkeypatch):
    """Images are read a batch at a time, when their predictions are asked for."""
    for i, path in enumerate(files(folders) * 4):
        os.symlink(path, tmp_path / f'{i}.png')
    loads = []
    load = FileSource.load
    monkeypatch.setattr(FileSource, 'load', lambda self, i, mode: loads.append(i) or load(self, i, mode))
    stream = timm_amf.predict(runs['plain'], tmp_path, options=RunOptions(cpu=True, batch_size=4, workers=0))
    assert not loads
    for number, prediction in enumerate(stream, start=1):
        assert isinstance(prediction, Prediction) and prediction.path.endswith(f'/{number - 1}.png')
        assert len(loads) <= number + 7
    assert number == len(loads) == 60


def test_images_are_shown_as_in_training(runs, folders, tmp_path):
    """Turned by their EXIF, with transparency over white, and of 16 bits: one place reads them."""
    path = files(folders)[0]
    image = Image.open(path).convert('RGB')
    exif = Image.Exif()
    exif[0x0112] = 6
    image.rotate(90, expand=True).save(tmp_path / 'turned.png', exif=exif)
    alpha = image.copy()
    alpha.putalpha(255)
    alpha.save(tmp_path / 'alpha.png')
    grey = image.convert('L')
    grey.convert('RGB').save(tmp_path / 'grey.png')
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(tmp_path / 'deep.png')
    names = [path, *(str(tmp_path / f'{name}.png') for name in ('turned', 'alpha', 'grey', 'deep'))]
    one, turned, opaque, grey, deep = (
        p.probabilities for p in timm_amf.predict(runs['plain'], names, options=RunOptions(cpu=True, batch_size=1)))
    assert one == turned == opaque != grey and grey == deep


def test_every_kind_of_source(runs, folders, tmp_path, capsys):
    paths = files(folders, 'blobs')
    expected = list(timm_amf.predict(runs['plain'], paths, options=CPU))
    published, exported = tmp_path / 'published', tmp_path / 'model.onnx'
    timm_amf.publish(runs['plain'], 'org/name', 'mit', dry_run=published)
    assert main(['export', str(runs['plain']), '--format', 'onnx', '--output', str(exported)]) == 0
    model = timm.create_model(f'local-dir:{published}', pretrained=True)
    for source in (published, exported, model):
        for one, two in zip(expected, timm_amf.predict(source, paths, options=CPU), strict=True):
            assert one.labels == two.labels
            assert two.probabilities == pytest.approx(one.probabilities, rel=1e-3, abs=1e-6)
    # They are evaluated, too, by the names of their classes.
    data = tmp_path / 'data'
    for k, name in enumerate(CLASSES):
        folder = data / 'test' / name.replace('/', '-')
        folder.mkdir(parents=True)
        component, number = ('stripes', k) if k < 3 else ('blobs', k - 3)
        for path in (folders / component / f'val/class{number}').iterdir():
            os.symlink(path, folder / path.name)
    words = ['--data-dir', str(data), '--split', 'test', '--cpu']
    assert main(['evaluate', str(published), *words]) == 2
    assert "class 'blobs-class0'" in capsys.readouterr().err  # a folder cannot be named stripes/class0
    assert main(['evaluate', str(exported), '--cpu']) == 2
    assert 'is no run, and has no images of its own; add --data-dir' in capsys.readouterr().err


def test_a_published_model_is_evaluated(run_of_colours, tmp_path, capsys):
    run, data = run_of_colours
    published = tmp_path / 'published'
    timm_amf.publish(run, 'org/name', 'mit', dry_run=published)
    assert main(['export', str(run), '--format', 'onnx', '--output', str(tmp_path / 'm.onnx')]) == 0
    capsys.readouterr()
    found = []
    for words in ([run], [published, '--data-dir', data], [tmp_path / 'm.onnx', '--data-dir', data]):
        assert main(['evaluate', *map(str, words), '--cpu']) == 0
        line = capsys.readouterr().out.splitlines()[2].split()
        assert line[0] == str(words[0])
        found.append(line[1:])
    assert found[0] == found[1] and found[0][:2] == found[2][:2]


def test_a_model_without_names(tmp_path, folders):
    """ImageNet's as timm has them; else the index of the class."""
    torch.manual_seed(0)
    found, = timm_amf.predict(timm.create_model('test_resnet'), files(folders)[0], 1, CPU)
    assert len(found.labels[0]) > 2 and not found.labels[0].isdigit()
    found, = timm_amf.predict(timm.create_model('test_resnet', num_classes=3), files(folders)[0], 5, CPU)
    assert sorted(found.labels) == ['0', '1', '2']


def test_predict_gives_one_class_at_least(runs, folders):
    for topk in (0, -1):
        with pytest.raises(timm_amf.UserError, match='topk: must be at least 1'):
            timm_amf.predict(runs['plain'], files(folders)[0], topk=topk)


def test_what_cannot_be_predicted(runs, folders, tmp_path, capsys):
    image, empty, bad = files(folders)[0], tmp_path / 'empty', tmp_path / 'bad.onnx'
    empty.mkdir()
    bad.write_text('no model')
    torch.onnx.export(
        torch.nn.Flatten(), (torch.zeros(1, 3, 8, 8),), tmp_path / 'other.onnx', dynamo=True, verbose=False)
    run, sweep = str(runs['plain']), tmp_path / 'sweep'
    (sweep / 'trial0-seed0').mkdir(parents=True)
    for words, message in (
            ([sweep, image], 'sweep: holds a sweep; name one of its runs'),
            ([run, 'nowhere.jpg'], 'nowhere.jpg: no such file or folder'),
            ([run, empty], 'empty: no images there (.jpeg, .jpg, .png); name others one by one'),
            ([empty, image], 'empty: no args.yaml there; give the folder of a run'),
            ([tmp_path / 'gone.onnx', image], 'gone.onnx: no such file'),
            ([bad, image], 'bad.onnx: is no ONNX file that can be run'),
            ([tmp_path / 'other.onnx', image], 'other.onnx: does not say how to prepare an image'),
            ([bad, image, '--weights', 'last'], '--weights last: '),
            ([run, image, '--class-map', bad], 'unknown flag --class-map'),
            ([run, image, '--blocks', 'tuned'], 'do not act on ResNet'),
            ([run, image, '--topk', '0'], '--topk: must be at least 1'),
            ([run, image, '--batch-size', '0'], '--batch-size: must be at least 1'),
            ([run, image, '--amp', '--cpu'], '--amp: float16 needs a GPU'),
            ([run, image, '--weights', 'ema'], 'the run kept no moving average'),
            ([run, image, '--output', bad / 'x.csv'], 'cannot be written'),
            ([run], 'arguments are required: PATH'),
    ):
        capsys.readouterr()
        assert main(['predict', *map(str, words)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.startswith('timm-amf predict: error: ') and error.count('\n') == 1
    (tmp_path / 'model.pt2').touch()
    with pytest.raises(UserError, match=r'model\.pt2: .* --format onnx writes one'):
        timm_amf.predict(tmp_path / 'model.pt2', files(folders)[0])
    with pytest.raises(UserError, match='no such file'):  # before the first prediction is asked for
        timm_amf.predict(run, 'nowhere.jpg')


def test_an_older_run_is_asked_without_its_data(runs, folders, tmp_path):
    folder = shutil.copytree(runs['plain'], tmp_path / 'old')
    weights = folder / 'model_best.safetensors'
    save_file(load_file(weights), weights, metadata={'format': 'pt'})  # which has no names
    image = files(folders)[0]
    one, = timm_amf.predict(folder, image, options=CPU)
    two, = timm_amf.predict(runs['plain'], image, options=CPU)
    assert one.labels == two.labels and one.probabilities == two.probabilities  # the data name the classes
    text = (folder / 'args.yaml').read_text()
    (folder / 'args.yaml').write_text(text.replace(str(folders), '/gone'))
    one, = timm_amf.predict(folder, image, options=CPU)
    assert one.labels == [str(CLASSES.index(name)) for name in two.labels]
