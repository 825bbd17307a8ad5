"""Models loaded from the loopback Hub and from folders: what comes back, and what does not pass."""
import json
import os
import pickle
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from loopback import TOKEN
from safetensors.torch import load_file, save

import timm_amf
from timm_amf import Plan, UserError

REPO = 'org/birds'
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def put(hub, folder: Path, **changed) -> str:
    """The folder as a repository, some files changed or (None) left out; the weights come over LFS."""
    files = {**contents(folder), **changed}
    return hub.put(REPO, {k: v for k, v in files.items() if v is not None}, large=('model.safetensors',))


def copied(folder: Path, target: Path, **changed) -> Path:
    """A copy of the folder, some files changed."""
    for name, content in {**contents(folder), **changed}.items():
        (target / name).write_bytes(content)
    return target


def moved(folder: Path) -> bytes:
    """Its weights with another bias."""
    state = load_file(folder / 'model.safetensors')
    state['fc.bias'] += 1
    return save(state)


# -- what comes back --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ('amf', 'global_k'))
def test_a_repository_is_asked_about_images(client, hub, staged, runs, folders, name):
    put(hub, staged(name))
    images = sorted((folders / 'blobs/val/class1').iterdir())
    for one, two in zip(
            timm_amf.predict(f'hf-hub:{REPO}', images), timm_amf.predict(runs(name), images), strict=True):
        assert one.labels == two.labels and one.probabilities == two.probabilities
        assert one.decisions == two.decisions != {}  # of global-k the one path of all images


@pytest.mark.parametrize('name', ('amf', 'multitune', 'spottune', 'plain'))
def test_a_model_and_what_made_it(client, hub, staged, runs, name):
    commit, run = put(hub, staged(name)), runs(name)
    model = timm_amf.load(REPO)
    assert not model.training
    state = load_file(run / 'model_best.safetensors')
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    p = model.provenance
    assert (p.source, p.commit, p.plan) == (REPO, commit, Plan.from_yaml(run / 'plan.yaml'))
    text = str(p)
    assert 'data stripes: 3 classes, 27 training and 15 validation images' in text
    assert f'plan: sgd, {p.plan.epochs} epochs, LR 0.05' in text and commit[:10] in text


@pytest.mark.parametrize('name', ('amf', 'spottune', 'plain'))
def test_keywords_are_those_of_create_model(staged, name):
    folder = staged(name)
    model, maps = timm_amf.load(folder), timm_amf.load(folder, features_only=True)
    with torch.no_grad():
        pooled = model.forward_head(model.forward_features(IMAGES), pre_logits=True)
        for other in (timm_amf.load(folder, num_classes=7),
                      timm.create_model(f'local-dir:{folder}', pretrained=True, num_classes=7).eval()):
            assert torch.equal(other.forward_head(other.forward_features(IMAGES), pre_logits=True), pooled)
            assert other(IMAGES).shape == (3, 7)
        assert torch.equal(timm_amf.load(folder, num_classes=0)(IMAGES), pooled)
        found = maps(IMAGES)
        assert [m.shape[1] for m in found] == maps.feature_info.channels() and maps.provenance.plan is not None
        if name != 'plain':
            assert torch.equal(found[-1], model.forward_intermediates(IMAGES, intermediates_only=True)[-1])
    with pytest.raises(TypeError, match='frobnicate'):
        timm_amf.load(folder, frobnicate=1)


@pytest.mark.parametrize('name', ('spottune', 'plain'))
def test_one_channel_sees_the_sum_of_three(staged, name):
    """timm sums the kernels of the first convolution; all three parts of these have the same statistics."""
    model, grey = timm_amf.load(staged(name)), timm_amf.load(staged(name), in_chans=1)
    x = IMAGES[:, :1]
    with torch.no_grad():
        torch.testing.assert_close(grey(x), model(x.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)


def test_pinned_revisions(client, hub, staged):
    first = put(hub, staged('plain'))
    second = put(hub, staged('plain'), **{'model.safetensors': moved(staged('plain'))})
    with torch.no_grad():
        new = timm_amf.load(REPO)(IMAGES)
        for old in (timm_amf.load(REPO, revision=first), timm_amf.load(f'{REPO}@{first}'),
                    timm_amf.load(f'hf-hub:{REPO}', first),
                    timm.create_model(f'hf-hub:{REPO}@{first}', pretrained=True).eval()):
            torch.testing.assert_close(old(IMAGES) + 1, new)
    assert timm_amf.load(REPO).provenance.commit == second
    with pytest.raises(UserError, match=f'no such folder here, and on the Hub: .*{REPO}.*v9'):
        timm_amf.load(f'{REPO}@v9')


def test_folders(staged, runs, tmp_path):
    folder = staged('amf')
    with torch.no_grad():
        expected = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()(IMAGES)
        for path in (folder, str(folder), f'local-dir:{folder}'):
            model = timm_amf.load(path)
            assert torch.equal(model(IMAGES), expected) and model.provenance.source == str(folder)
    with pytest.raises(UserError, match='no such folder'):
        timm_amf.load(tmp_path / 'none')
    run = timm_amf.load(runs('amf'))  # a run's folder serves as well
    assert run.provenance.plan.to_dict() == model.provenance.plan.to_dict() and run.num_classes == model.num_classes
    with pytest.raises(UserError, match='has no config.json; give a folder'):
        timm_amf.load(tmp_path)
    with pytest.raises(UserError, match='is a folder, and has no revision'):
        timm_amf.load(folder, 'v1')


def test_offline_from_the_cache(client, hub, staged, monkeypatch):
    put(hub, staged('amf'))
    timm_amf.load(REPO)
    asked = len(hub.requests)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    model = timm_amf.load(REPO)
    assert len(hub.requests) == asked and model.provenance.plan is not None
    with pytest.raises(UserError, match='^org/other: no such folder here, and on the Hub: .* cannot be reached'):
        timm_amf.load('org/other')


@pytest.mark.parametrize('name', ['org/mistyped', 'mistyped', 'a/b/c'])
def test_a_mistyped_name_is_one_line(client, hub, staged, name):
    with pytest.raises(UserError, match=f'^{name}: no such folder here, and on the Hub: .*{name}') as error:
        timm_amf.load(name)
    assert '\n' not in str(error.value)


# -- what does not pass -----------------------------------------------------------------------------------------------

class Bomb:
    """A pickle of this touches a file where it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize('name', ('pytorch_model.bin', 'weights.pth', '../../../up.pkl', 'a\x1b[31m.bin'))
def test_pickles_are_refused(client, hub, staged, tmp_path, name):
    bomb = pickle.dumps(Bomb(tmp_path / 'exploded'))
    put(hub, staged('plain'), **{'model.safetensors': None, name: bomb})
    with pytest.raises(UserError) as error:
        timm_amf.load(REPO)
    assert 'pickle' in str(error.value) and '\x1b' not in str(error.value) and '\n' not in str(error.value)
    assert not (tmp_path / 'exploded').exists()
    # Nothing but the files that are known here was asked for.
    asked = {path.rpartition('/')[2] for method, path, _ in hub.requests if '/resolve/' in path}
    assert asked <= {'config.json', 'model.safetensors', 'plan.yaml'}
    assert all(client in p.parents for p in tmp_path.rglob('*') if p.is_file())


def test_a_pickle_beside_the_weights_is_not_touched(staged, tmp_path):
    (tmp_path / 'model').mkdir()
    bomb = pickle.dumps(Bomb(tmp_path / 'exploded'))
    timm_amf.load(copied(staged('plain'), tmp_path / 'model', **{'pytorch_model.bin': bomb}))
    assert not (tmp_path / 'exploded').exists()


def test_no_model_at_all(client, hub, staged):
    hub.put(REPO, {'README.md': b'---\nlicense: mit\n---\n'})
    with pytest.raises(UserError, match='org/birds: has no config.json'):
        timm_amf.load(REPO)
    hub.put(REPO, {'config.json': (staged('plain') / 'config.json').read_bytes()})
    with pytest.raises(UserError, match='org/birds: has no model.safetensors'):
        timm_amf.load(REPO)


def changed(config, path, value):
    """A copy with one entry set, along keys with dots between."""
    config = json.loads(json.dumps(config))
    at = config
    *parents, last = path.split('.')
    for key in parents:
        at = at.setdefault(key, {})
    at[last] = value
    return config


HOSTILE = [
    ('architecture', 'no_such_model'), ('architecture', '../../etc/passwd'), ('architecture', 'hf-hub:evil/model'),
    ('architecture', None),
    ('num_classes', 10 ** 12), ('num_classes', -1), ('num_classes', 'all'), ('num_classes', True),
    ('model_args', ['resnet18']), ('model_args.num_classes', 10 ** 12),
    ('model_args.backbones', ['hf-hub:evil/model', 'test_resnet']), ('model_args.policy', '/etc/passwd'),
    ('model_args.policy', 'x' * 1000), ('model_args.policy', '..'), ('model_args.policy', 'a\nb'),
    ('model_args.policy', "__import__('os').system('true')"),
    ('model_args.backbones', ['test_resnet'] * 1000),
    ('model_args.backbone_kwargs', {'pretrained_cfg_overlay': {'file': '/etc/passwd'}}),
    ('model_args.backbone_kwargs', {'pretrained_cfg_overlay': {'url': 'http'}}),
    ('model_args.backbone_kwargs', {'checkpoint_path': 'x'}), ('model_args.backbone_kwargs', {'pretrained': True}),
    ('model_args.pretrained_parts', True), ('model_args.pretrained_strict', False), ('model_args.cache_dir', 'x'),
    ('model_args.pretrained_cfg_overlay', {'mean': [0.5]}), ('model_args.__class__', 'x'),
    ('model_args.img_size', 10 ** 9), ('model_args.img_size', 10 ** 400), ('model_args.drop_rate', float('nan')),
    ('model_args.drop_rate', float('inf')), ('model_args.policy_kwargs', {'a': {'b': {'c': {'d': {'e': {'f': 1}}}}}}),
    ('model_args.policy_kwargs', {f'k{i}': i for i in range(3000)}), ('model_args.a b', 1),
    ('pretrained_cfg', None), ('pretrained_cfg.file', '/etc/passwd'), ('pretrained_cfg.url', 'http://evil'),
    ('pretrained_cfg.state_dict', {'a': 1}), ('pretrained_cfg.hf_hub_id', 'evil/model'),
    ('pretrained_cfg.custom_load', True), ('pretrained_cfg.frobnicate', 1), ('pretrained_cfg.mean', [float('nan')] * 3),
    ('pretrained_cfg.input_size', [3, 10 ** 9, 10 ** 9]), ('pretrained_cfg.crop_pct', 1e300),
    ('label_names', 'abc'), ('label_names', [1, 2]), ('label_names', ['x' * 10_000]), ('label_descriptions', {'a': []}),
    *(('timm_amf', section) for section in (
        [], {'data': 1}, {'data': [1]}, {'data': [{'name': 1}]}, {'blocks': {'a': 1}}, {'blocks': 'all'},
        {'epoch': 'x'}, {'data': [dict(name='a\x1b[31m', dataset='', classes=1, train=1, val=1)]})),
]


@pytest.mark.parametrize('path,value', HOSTILE, ids=[f'{i}-{path}' for i, (path, _) in enumerate(HOSTILE)])
def test_hostile_configurations(staged, tmp_path, monkeypatch, path, value):
    """Refused by their contents, before a model is built, in one line that can be printed."""
    config = changed(json.loads((staged('amf') / 'config.json').read_text()), path, value)
    monkeypatch.setattr(timm, 'create_model', lambda *a, **k: pytest.fail('was built'))
    (tmp_path / 'config.json').write_text(json.dumps(config))
    (tmp_path / 'model.safetensors').write_bytes(b'')
    with pytest.raises(UserError) as error:
        timm_amf.load(tmp_path)
    text = str(error.value)
    assert text.startswith(f'{tmp_path}: ') and text.isprintable() and len(text) < 300 + len(str(tmp_path))


@pytest.mark.parametrize('value', [
    {'backbones': ['test_resnet'] * 40}, {'policy_kwargs': {'depth': 60_000}}, {'num_classes': 900_000},
    {'backbones': ['resnetv2_152x4_bit', 'resnetv2_152x4_bit']}, {'frobnicate': 1},
])
def test_nothing_is_allocated_that_the_weights_do_not_fill(staged, tmp_path, value):
    """Plausible arguments that mean another network: compared on the meta device."""
    config = json.loads((staged('amf') / 'config.json').read_text())
    config['model_args'].update(value)
    copied(staged('amf'), tmp_path, **{'config.json': json.dumps(config).encode()})
    allocated = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.device.type != 'meta':
                allocated.append(out.numel())
            return out

    with Watch(), pytest.raises(UserError) as error:
        timm_amf.load(tmp_path)
    assert '\n' not in str(error.value)
    assert max(allocated, default=0) < 1_000_000


@pytest.mark.parametrize('file,text', [
    *(('config.json', text) for text in (
        '', '{', '[]', '"x"', '[' * 100_000, '{"a": ' * 100_000, '{"a": 1' + '0' * 5000 + '}')),
    *(('plan.yaml', text) for text in (
        'a: &a [x, x]\nplan: [*a, *a]', 'plan: !!python/object/apply:os.mkdir [exploded]', 'plan: {frobnicate: 1}',
        'plan: {lr: fast}', '- 1', ': : :', 'plan: ' + '[' * 100_000, 'plan: ' + '# ' * 200_000)),
    ('model.safetensors', ''), ('model.safetensors', 'x' * 1000),
], ids=lambda text: text[:12])
def test_damaged_files(staged, tmp_path, monkeypatch, file, text):
    monkeypatch.chdir(tmp_path)
    copied(staged('plain'), tmp_path, **{file: text.encode()})
    with pytest.raises(UserError) as error:
        timm_amf.load(tmp_path)
    assert str(error.value).startswith(f'{tmp_path}: {file}: ') and '\n' not in str(error.value)
    assert not (tmp_path / 'exploded').exists()


def test_a_plan_with_aliases_is_not_read(staged, tmp_path):
    """A valid one: it is the aliases that are refused, before what they stand for is written out."""
    text = b'plan: {schedule: &s {sched: step}, roles: {head: {schedule: *s}}}'
    plain = text.replace(b'&s ', b'').replace(b'*s', b'{sched: step}')
    copied(staged('plain'), tmp_path, **{'plan.yaml': plain})
    assert timm_amf.load(tmp_path).provenance.plan.schedule.sched == 'step'
    (tmp_path / 'plan.yaml').write_bytes(text)
    with pytest.raises(UserError, match='aliases'):
        timm_amf.load(tmp_path)


def bad_weights(path: Path, kind: str) -> bytes:
    if kind == 'truncated':
        return path.read_bytes()[:-1000]
    if kind == 'header only':
        return path.read_bytes()[:100]
    if kind == 'another model':
        return save(timm.create_model('test_resnet', num_classes=3).state_dict())
    state = load_file(path)
    if kind == 'one missing':
        del state[next(iter(state))]
    else:
        state['evil' if kind == 'one more' else next(iter(state))] = torch.zeros(3)
    return save(state)


@pytest.mark.parametrize('kind', (
    'truncated', 'header only', 'one missing', 'one more', 'another shape', 'another model'))
def test_other_weights_than_those_of_the_configuration(staged, tmp_path, kind):
    copied(staged('amf'), tmp_path, **{
        'model.safetensors': bad_weights(staged('amf') / 'model.safetensors', kind)})
    with pytest.raises(UserError, match=r': model\.safetensors: ') as error:
        timm_amf.load(tmp_path)
    assert '\n' not in str(error.value)


def test_a_swapped_file_is_seen_by_its_hash_and_not_kept(client, hub, staged, runs):
    """Of the same length and layout: only the hash tells."""
    put(hub, staged('plain'))
    good, other = (staged('plain') / 'model.safetensors').read_bytes(), moved(staged('plain'))
    assert len(other) == len(good)
    hub.fault('GET', 'model.safetensors', serve=other)
    with pytest.raises(UserError, match='org/birds: model.safetensors is not what the Hub says it is'):
        timm_amf.load(REPO)
    hub.faults.clear()
    model = timm_amf.load(REPO)
    assert torch.equal(model.state_dict()['fc.bias'], load_file(runs('plain') / 'model_best.safetensors')['fc.bias'])


# -- the Hub in trouble -----------------------------------------------------------------------------------------------

FAULTS = {
    '401': dict(status=401, headers={'X-Error-Message': 'Invalid credentials in Authorization header'}),
    '404': dict(status=404, headers={'X-Error-Code': 'RepoNotFound'}),
    '500': dict(status=500),
    'gated': dict(status=403, headers={'X-Error-Code': 'GatedRepo'}),
    'drop': dict(drop=True),
    'cut': dict(cut=True),
}


@pytest.mark.parametrize('method,file,kind', [
    *(('HEAD', 'config.json', kind) for kind in FAULTS if kind != 'cut'),
    ('HEAD', 'model.safetensors', 'drop'), ('GET', 'model.safetensors', '500'), ('GET', 'model.safetensors', 'cut'),
])
def test_a_hub_in_trouble(client, hub, staged, no_waits, method, file, kind):
    """One line, without the token; nothing is left half-written, and the next try succeeds."""
    put(hub, staged('plain'))
    hub.fault(method, f'resolve/.*{file}', **FAULTS[kind])
    with pytest.raises(UserError) as error:
        timm_amf.load(REPO)
    assert TOKEN not in str(error.value)
    if file == 'model.safetensors':
        assert not list(client.rglob('model.safetensors'))
    hub.faults.clear()
    assert timm_amf.load(REPO).provenance.plan is not None


def test_a_connection_that_is_cut_once_is_taken_up_again(client, hub, staged, no_waits):
    put(hub, staged('plain'))
    hub.fault('GET', 'resolve/.*model.safetensors', cut=True, times=1)
    timm_amf.load(REPO)
    assert sum(method == 'GET' and 'safetensors' in path for method, path, _ in hub.requests) == 2
