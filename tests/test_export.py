"""Exported files, opened as their users open them: with ONNX Runtime, `torch.export.load`, or timm alone."""
import json
import re
import sys
import zipfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import onnx
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import nn

import timm_amf
from timm_amf.cli import main
from timm_amf.errors import UserError
from timm_amf.export import FORMATS, Source, describe, export_model, open_source

sys.path.insert(0, str(Path(__file__).parent / 'engine'))
from conftest_engine import SMALL, components, folders, run  # noqa: E402, F401  fixtures

NAMES = ['ant', 'bee', 'cat', 'dog', 'élan']
MODELS = {
    'amf': dict(model_name='amf', backbones=('test_resnet',) * 2, policy='test_resnet', policy_input_size=40),
    'multitune': dict(model_name='multitune', backbones=('test_resnet', 'test_resnet')),
    'spottune': dict(model_name='spottune', backbone='test_resnet', policy='test_resnet'),
    'vit': dict(model_name='test_vit', img_size=64),
}
SPOTTUNE = [
    *SMALL[SMALL.index('--img-size'):SMALL.index('--branch-lr')], '--model', 'spottune', '--model-kwargs',
    'backbone=test_resnet', 'policy=test_resnet', '--policy-lr', '0.02', '--epochs', '1',
]
PLAIN = ['--model', 'test_resnet', *SMALL[SMALL.index('--img-size'):SMALL.index('--branch-lr')], '--epochs', '1']
CLASSES = ['stripes/class0', 'stripes/class1', 'class2', 'blobs/class0', 'blobs/class1']


def images(batch: int, size: int = 64, seed: int = 100) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed + batch))


def network(name: str) -> nn.Module:
    """A model whose policy decides otherwise for every image."""
    torch.manual_seed(0)
    model = timm.create_model(**MODELS[name], num_classes=5, pretrained_cfg_overlay=dict(mean=(0.4, 0.45, 0.5))).eval()
    policy = getattr(model, 'policy', None)
    with torch.no_grad():
        if policy is not None:
            x = images(32)
            head = policy.get_classifier()
            head.weight.mul_(100)
            head.bias.sub_(policy.forward_logits(x).mean(0))
        if name == 'spottune':
            for tuned in model.blocks_tuned:
                for p in tuned.parameters():
                    p.mul_(1.3)
    return model


def source(model: nn.Module, size: int = 64) -> Source:
    data = timm.data.resolve_data_config({'crop_pct': 0.9, 'img_size': size}, model=model)
    return Source(model, describe(model, data, NAMES))


def opened(path: Path):
    """The file as a function of images, and what it says of itself, by other means than the package's."""
    if path.suffix == '.onnx':
        session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
        name = session.get_inputs()[0].name
        props = session.get_modelmeta().custom_metadata_map
        words = ('architecture', 'interpolation', 'crop_mode')
        config = {k: v if k in words else json.loads(v) for k, v in props.items()}
        return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0]), config
    if path.suffix == '.pt2':
        extra = {'config.json': ''}
        model = torch.export.load(path, extra_files=extra).module()
        return model, json.loads(extra['config.json'])
    with safe_open(path, 'pt') as file:
        config = json.loads(file.metadata()['config.json'])
    overlay = dict(mean=config['mean'], std=config['std'])
    model = timm.create_model(config['architecture'], pretrained_cfg_overlay=overlay, **config['model_args']).eval()
    model.load_state_dict(load_file(path))
    return model, config


@torch.no_grad()
def assert_same(file, model, size: int = 64, batches=(1, 4, 7)):
    for batch in batches:
        x = images(batch, size)
        expected = model(x)
        got = file(x)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
        assert torch.equal(got.argmax(1), expected.argmax(1))
        assert len({tuple(row.tolist()) for row in got}) == batch  # each image has a result of its own


# The ONNX exporter takes seconds a network; `test_amf_run` has an AMF.
@pytest.mark.parametrize('name, form', [
    pytest.param('spottune', 'onnx', marks=pytest.mark.slow), pytest.param('vit', 'onnx', marks=pytest.mark.slow),
    pytest.param('amf', 'pt2', marks=pytest.mark.slow), pytest.param('multitune', 'pt2', marks=pytest.mark.slow),
    ('spottune', 'pt2'), pytest.param('vit', 'pt2', marks=pytest.mark.slow),
    ('amf', 'safetensors'), ('spottune', 'safetensors'),
])
def test_round_trip(name, form, tmp_path):
    model = network(name)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    routing = getattr(model, 'routing', None)
    path = tmp_path / f'model{FORMATS[form].suffix}'
    exported = export_model(source(model), form, path)
    assert exported.batches == (1, 2, 5) and exported.difference <= 1e-4 * exported.largest
    assert exported.same_class == 8
    assert list(tmp_path.iterdir()) == [path]

    file, config = opened(path)
    assert_same(file, model)
    assert config['class_names'] == NAMES and config['num_classes'] == 5
    assert config['mean'] == [0.4, 0.45, 0.5] and config['std'] == list(model.pretrained_cfg['std'])
    assert config['input_size'] == [3, 64, 64] and config['crop_pct'] == 0.9 and config['crop_mode'] == 'center'
    assert config['interpolation'] == model.pretrained_cfg['interpolation']
    assert config['versions']['timm'] == timm.__version__
    # The model is as it was.
    assert getattr(model, 'routing', None) == routing
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    # No file of this machine is named.
    for text in (str(Path(timm.__file__).parent), str(Path(timm_amf.__file__).parents[1]), str(tmp_path)):
        assert text.encode() not in content(path)


def content(path: Path) -> bytes:
    if path.suffix != '.pt2':
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        return b''.join(archive.read(name) for name in archive.namelist())


def test_policies_of_these_tests_decide():
    x = images(7)
    with torch.no_grad():
        weights = network('amf').forward_policy(x)
        shares = network('spottune').forward_shares(x)
    assert weights.std(0).min() > 0.05
    assert len({tuple(row.tolist()) for row in shares}) > 3


def test_equal_models_give_equal_files(tmp_path):
    for name in ('a', 'b'):
        export_model(source(network('spottune')), 'safetensors', tmp_path / name)
    assert (tmp_path / 'a').read_bytes() == (tmp_path / 'b').read_bytes()


@pytest.mark.slow
def test_onnx_of_fused_attention_in_windows(tmp_path):
    model = timm.create_model('test_maxvit', num_classes=5).eval()
    fused = [m.fused_attn for m in model.modules() if hasattr(m, 'fused_attn')]
    assert any(fused)
    size = model.pretrained_cfg['input_size'][-1]
    export_model(source(model, size), 'onnx', tmp_path / 'a.onnx')
    assert_same(opened(tmp_path / 'a.onnx')[0], model, size)
    assert [m.fused_attn for m in model.modules() if hasattr(m, 'fused_attn')] == fused


@pytest.mark.slow
def test_opset_that_cannot_be_had(small, tmp_path):
    with pytest.raises(UserError, match='--opset 7'):
        export_model(small, 'onnx', tmp_path / 'a.onnx', opset=7)
    assert not list(tmp_path.iterdir())


def test_arguments_without_where_weights_were():
    overlay = {'pretrained_cfg_overlay': {'file': '/home/someone/weights.safetensors'}}
    model = timm.create_model(
        'amf', backbones=('test_resnet',) * 2, backbone_kwargs=(overlay, {}), policy='test_resnet', num_classes=5)
    assert model.backbone_parts[0].kwargs['pretrained_cfg_overlay']
    config = describe(model)
    assert 'backbone_kwargs' in config['model_args'] and 'someone' not in json.dumps(config)


# ---- a file is whole and right, or not there


class FixedBatch(nn.Module):
    """A graph takes the size of its batch for a constant."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x):
        y = self.model(x)
        return y.reshape(int(y.numel()) // 5, 5)[:int(x.shape[0])] * int(x.shape[0])


@pytest.fixture
def small():
    torch.manual_seed(0)
    return source(timm.create_model('test_resnet', num_classes=5).eval())


def test_a_model_of_a_fixed_batch_is_refused(small, tmp_path):
    with pytest.raises(UserError, match='pt2 file'):
        export_model(replace(small, model=FixedBatch(small.model)), 'pt2', tmp_path / 'a.pt2')
    assert not list(tmp_path.iterdir())


def test_zeros_do_not_pass_for_small_logits(small, tmp_path, monkeypatch):
    with torch.no_grad():
        small.model.fc.weight.mul_(1e-9)
        small.model.fc.bias.zero_()
    zeros = replace(FORMATS['safetensors'], read=lambda path: lambda x: torch.zeros(len(x), 5))
    monkeypatch.setitem(FORMATS, 'safetensors', zeros)
    with pytest.raises(UserError, match='differs from the model'):
        export_model(small, 'safetensors', tmp_path / 'a.safetensors')


FAULTS = {
    'wrong': 'differs from the model by 1.0e-03', 'nan': 'differs', 'shape': 'batch of 2',
    'unreadable': 'what is this', 'full disk': 'no space left',
}


@pytest.mark.parametrize('fault', (*FAULTS, 'interrupt'))
def test_what_was_there_stays_where_the_check_fails(small, tmp_path, monkeypatch, fault):
    path = tmp_path / 'a.safetensors'
    path.write_bytes(b'what was there')

    def read(path):
        if fault == 'unreadable':
            raise ValueError('what is this?')
        if fault == 'interrupt':
            raise KeyboardInterrupt
        change = {'wrong': lambda y: y + 1e-3, 'nan': lambda y: y * float('nan'), 'shape': lambda y: y[:1]}[fault]
        return lambda x: change(small.model(x))

    def write(source, example, path, opset):
        path.write_bytes(b'half')
        if fault == 'full disk':
            raise OSError(28, 'No space left on device')

    monkeypatch.setitem(FORMATS, 'safetensors', replace(FORMATS['safetensors'], read=read, write=write))
    with pytest.raises(KeyboardInterrupt if fault == 'interrupt' else UserError, match=FAULTS.get(fault)):
        export_model(small, 'safetensors', path, overwrite=True)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b'what was there'


def test_what_arguments_do_not_tell_is_no_safetensors_file(small, tmp_path):
    for m in small.model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eps = 0.5
    with pytest.raises(UserError, match='differs from the model'):
        export_model(small, 'safetensors', tmp_path / 'a.safetensors')
    assert export_model(small, 'pt2', tmp_path / 'a.pt2').difference < 1e-6


def test_missing_package(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    with pytest.raises(ImportError, match='onnxscript'):
        export_model(small, 'onnx', tmp_path / 'a.onnx')
    assert not list(tmp_path.iterdir())


# ---- runs


@pytest.fixture
def export(capsys, tmp_path):
    """Exports by the command: export(folder, format, *flags) -> model, configuration, what was printed."""
    def _export(folder, form, *flags):
        path = tmp_path / 'made' / f'exported{FORMATS[form].suffix}'
        capsys.readouterr()
        assert main(['export', str(folder), '--format', form, '--output', str(path), '--overwrite', *flags]) == 0
        return *opened(path), capsys.readouterr().out
    return _export


def rebuilt(name: str, folder: Path, weights: str = 'model_best.safetensors') -> nn.Module:
    kwargs = dict(MODELS[name], policy_input_size=None) if name == 'amf' else MODELS[name]
    model = timm.create_model(**kwargs, num_classes=5).eval()
    model.load_state_dict(load_file(folder / weights))
    return model


def test_amf_run(run, export, capsys):  # noqa: F811
    folder = run('amf', '--model-ema', '--model-ema-decay', '0.5', '--crop-pct', '0.8', '--epochs', '2')
    capsys.readouterr()
    command = ['export', str(folder), '--format', 'onnx', '--batch', '3', '--opset', '20']
    assert main(command) == 0
    out = capsys.readouterr().out
    assert 'batches of 1, 2, 3' in out and len(out.splitlines()) == 1
    file, config = opened(folder / 'exported.onnx')
    assert [o.version for o in onnx.load(folder / 'exported.onnx').opset_import if o.domain == ''] == [20]
    assert_same(file, rebuilt('amf', folder), 32)
    assert config['input_size'] == [3, 32, 32] and config['crop_pct'] == 0.8
    assert config['class_names'] == CLASSES
    assert main(command) == 2 and 'is there already' in capsys.readouterr().err
    for weights, name in (('ema', 'ema'), ('last', 'ema'), ('raw', 'model')):
        file, *_ = export(folder, 'safetensors', '--weights', weights)
        assert_same(file, rebuilt('amf', folder, f'last/{name}.safetensors'), 32)


def test_spottune_run(run, export):  # noqa: F811
    folder = run('k', '--global-k', '1', base=SPOTTUNE)
    model = rebuilt('spottune', folder)
    for flags, path in (
            ([], model.chosen_blocks(1)), (['--blocks', 'policy'], None), (['--blocks', '0,-1'], [0, -1])):
        model.set_blocks(path)
        file, config, out = export(folder, 'safetensors', *flags)
        assert config['architecture'] == ('spottune' if path is None else 'test_resnet')
        assert path is None or f'one path, {len(path)} tuned' in out
        assert_same(file, model, 32)
    # What the run itself left is a published folder.
    assert export(folder / 'compact', 'safetensors')[1]['class_names'] == CLASSES


def test_run_whose_data_are_gone(run, export, folders, tmp_path):  # noqa: F811
    data, names = tmp_path / 'data', tmp_path / 'names.txt'
    data.symlink_to(folders / 'stripes')
    folder = run('plain', base=PLAIN, data=[str(data)])
    data.unlink()
    _, config, out = export(folder, 'safetensors')
    assert config['class_names'] == ['class0', 'class1', 'class2']  # of the weights
    save_file(load_file(folder / 'model_best.safetensors'), folder / 'model_best.safetensors')  # as of an older version
    file, config, out = export(folder, 'safetensors')
    assert 'class names are left out' in out and config['num_classes'] == 3 and 'class_names' not in config
    model = timm.create_model('test_resnet', num_classes=3).eval()
    model.load_state_dict(load_file(folder / 'model_best.safetensors'))
    assert_same(file, model, 32)

    _, config, out = export(folder, 'safetensors', '--data-dir', str(folders / 'blobs'))
    assert 'the data have 2 classes by now, and the model 3 outputs' in out and 'class_names' not in config

    names.write_text('a\nb\nc\n')
    for flag, path, expected in (
            ('--data-dir', folders / 'stripes', ['class0', 'class1', 'class2']),
            ('--class-names', names, ['a', 'b', 'c'])):
        _, config, out = export(folder, 'safetensors', flag, str(path))
        assert config['class_names'] == expected and 'left out' not in out


# ---- published folders


@pytest.fixture
def published(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model('test_vit', num_classes=5).eval()
    save_for_hf(model, str(tmp_path / 'vit'), model_config=dict(label_names=NAMES), safe_serialization=True)
    (tmp_path / 'vit' / 'args.yaml').write_text('model: test_vit\n')  # `timm-amf publish` leaves the run's options
    return tmp_path / 'vit', model


def test_published_folder(published, export):
    folder, model = published
    file, config, out = export(folder, 'safetensors')
    assert 'note' not in out and config['class_names'] == NAMES and config['input_size'] == [3, 160, 160]
    assert_same(file, model, 160)
    # At another size, which timm gives a ViT by resampling its position embedding.
    file, config, _ = export(folder, 'safetensors', '--img-size', '96', '128')
    model.set_input_size((96, 128))
    assert config['input_size'] == [3, 96, 128] and config['model_args']['img_size'] == [96, 128]
    x = torch.randn(3, 3, 96, 128)
    with torch.no_grad():
        torch.testing.assert_close(file(x), model(x), rtol=0, atol=1e-4)


def test_published_spottune_of_one_path(tmp_path):
    model = network('spottune')
    own = dict(timm_amf=dict(blocks=[1, 3]), label_names=NAMES)
    data = dict(img_size=48, crop_pct=0.7)
    save_for_hf(model, str(tmp_path), model_config=own, safe_serialization=True, data_config=data)
    exported = open_source(tmp_path)
    assert exported.config['input_size'] == [3, 48, 48] and exported.config['crop_pct'] == 0.7
    assert exported.config['architecture'] == 'test_resnet' and exported.config['class_names'] == NAMES
    x = images(6)
    with torch.no_grad():
        decided = model(x)
        model.set_blocks([1, 3])
        # The statistics of the backbone are another convention of the same images.
        cfg, plain = model.pretrained_cfg, exported.model.pretrained_cfg
        old, new = ([torch.tensor(c[k]).view(3, 1, 1) for k in ('mean', 'std')] for c in (cfg, plain))
        assert cfg['mean'] != plain['mean'] and exported.config['mean'] == list(plain['mean'])
        same = (x * old[1] + old[0] - new[0]) / new[1]
        torch.testing.assert_close(exported.model(same), model(x), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(decided, model(x), atol=1e-3)
        torch.testing.assert_close(open_source(tmp_path, blocks='policy').model(x), decided, rtol=1e-4, atol=1e-5)


def test_label_names_with_gaps(published):
    folder, _ = published
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps(dict(config, label_names={'1': 'bee', '4': 'elk'})))
    assert open_source(folder).config['class_names'] == ['0', 'bee', '2', '3', 'elk']


# ---- mistakes


@pytest.mark.parametrize('flags, words', [
    (['--format', 'pt2', '--batch', '0'], '--batch: must be at least 1'),
    (['--format', 'pt2', '--opset', '18'], 'has no operator sets'),
    (['--format', 'pt2', '--output', '{folder}'], 'is a folder'),
    (['--format', 'pt2', '--output', '{folder}/config.json/x.pt2'], 'cannot be written'),
    (['--format', 'pt2', '--output', '{folder}/model.safetensors'], 'is there already'),
    (['--format', 'pt2', '--img-size', '1', '2', '3'], '--img-size: takes one side'),
    (['--format', 'pt2', '--weights', 'ema'], 'one set of weights'),
    (['--format', 'pt2', '--data-dir', '.'], '--data-dir: .* published folder'),
    (['--format', 'pt2', '--blocks', 'tuned'], '--blocks does not act'),
    (['--format', 'pt2', '--class-names', '{folder}/config.json'], 'lines for the 5 classes of the model'),
])
def test_mistakes(published, capsys, flags, words):
    folder, _ = published
    before = {p.name for p in folder.iterdir()}
    assert main(['export', str(folder), *(flag.format(folder=folder) for flag in flags)]) == 2
    assert_one_line(capsys, words)
    assert {p.name for p in folder.iterdir()} == before


def assert_one_line(capsys, words):
    captured = capsys.readouterr()
    assert not captured.out and len(captured.err.splitlines()) == 1
    assert captured.err.startswith('timm-amf export: error: ') and re.search(words, captured.err), captured.err


@pytest.mark.parametrize('fault, words', [('pickle', 'pickle.*model.safetensors'), ('no json', 'config.json')])
def test_damaged_folders(published, capsys, fault, words):
    folder, model = published
    if fault == 'pickle':
        (folder / 'model.safetensors').unlink()
        torch.save(model.state_dict(), folder / 'pytorch_model.bin')
    else:
        (folder / 'config.json').write_text('{"architecture":')
    assert main(['export', str(folder), '--format', 'pt2']) == 2
    assert_one_line(capsys, words)


def test_damaged_runs(run, capsys):  # noqa: F811
    folder = run('plain', base=PLAIN)
    capsys.readouterr()

    def refused(words, *flags):
        assert main(['export', str(folder), '--format', 'pt2', *flags]) == 2
        assert_one_line(capsys, words)

    refused('kept no moving average', '--weights', 'ema')
    best = folder / 'model_best.safetensors'
    best.write_bytes(best.read_bytes()[:-100])
    refused('damaged')
    best.unlink()
    refused('model_best.safetensors: no such checkpoint')
    (folder / 'args.yaml').write_text('- a list')
    refused('args.yaml')


# ---- more than one file, and eight bits


def test_weights_beside_the_file(small, tmp_path, monkeypatch):
    """As above 2 GiB: the weights are in a file beside it, which is replaced with it or not at all."""
    exporter = torch.onnx.export
    once = cache(lambda: exporter(
        small.model, (images(2),), input_names=['input'], output_names=['logits'], verbose=False,
        dynamic_shapes=({0: torch.export.Dim('batch')},)))
    monkeypatch.setattr(torch.onnx, 'export', lambda *args, **kwargs: once())
    monkeypatch.setattr(timm_amf.export, 'ONE_FILE', 1000)
    path = tmp_path / 'a.onnx'
    text = str(export_model(small, 'onnx', path))
    assert {p.name for p in tmp_path.iterdir()} == {'a.onnx', 'a.onnx.data'} and 'the weights in a.onnx.data' in text
    assert path.stat().st_size < (tmp_path / 'a.onnx.data').stat().st_size
    assert_same(opened(path)[0], small.model)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        wrong = replace(FORMATS['onnx'], read=lambda path: lambda x: small.model(x) + 1)
        patch.setitem(FORMATS, 'onnx', wrong)
        with pytest.raises(UserError, match='differs'):
            export_model(small, 'onnx', path, overwrite=True)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    export_model(small, 'onnx', path, overwrite=True)
    assert {p.name for p in tmp_path.iterdir()} == {'a.onnx', 'a.onnx.1.data'}
    assert_same(opened(path)[0], small.model)
    monkeypatch.setattr(timm_amf.export, 'ONE_FILE', 2 ** 30)
    export_model(small, 'onnx', path, overwrite=True)
    assert list(tmp_path.iterdir()) == [path]


def test_eight_bits(run, capsys, folders):  # noqa: F811
    folder = run('plain', base=PLAIN)
    capsys.readouterr()
    assert main(['export', str(folder), '--format', 'onnx', '--int8']) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    small, path = folder / 'exported.int8.onnx', folder / 'exported.onnx'
    assert small.stat().st_size < 0.5 * path.stat().st_size
    (quantised, about), (file, config) = opened(small), opened(path)
    assert about == config and config['class_names'] == CLASSES
    kinds = {node.op_type for node in onnx.load(small).graph.node}
    assert {'QuantizeLinear', 'DequantizeLinear'} <= kinds
    # The accuracies, counted anew: images prepared by what the file says, labels by name.
    transform = timm.data.create_transform(**{k: config[k] for k in (
        'input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')})
    right, count = [0, 0], 0
    for image in sorted(folders.glob('*/val/*/*.png')):
        name = image.parent.name
        label = CLASSES.index(name if name == 'class2' else f'{image.parents[2].name}/{name}')
        x = transform(Image.open(image).convert('RGB'))[None]
        for i, model in enumerate((quantised, file)):
            right[i] += int(model(x).argmax()) == label
        count += 1
    shares = [100 * r / count for r in right]
    assert f'validation images: {count}, top-1 {shares[0]:.2f} in the place of {shares[1]:.2f} (' in line
    assert f'({shares[0] - shares[1]:+.2f} points)' in line
    assert main(['export', str(folder), '--format', 'pt2', '--int8']) == 2
    assert_one_line(capsys, '--int8: is for --format onnx')
