"""Fine-tuned tags: what timm knows of them, that they are as their recipes say, and where their weights come from."""
import json
from dataclasses import replace

import pytest
import timm
import torch
from hub_runs import folders, train  # noqa: F401  a fixture
from huggingface_hub import constants
from safetensors.torch import save

import timm_amf
from timm_amf.data import DataSpec
from timm_amf.engine.config_file import find_config as recipe_path
from timm_amf.engine.config_file import list_recipes, read_config
from timm_amf.engine.options import build_parser
from timm_amf.errors import UserError
from timm_amf.models.tags import FINE_TUNED, OWNER

SMALL = 'spottune_resnet26.decathlon_daimlerpedcls'
# Of the data sets, by the name of the component: what a recipe leaves to the data.
CLASSES = {
    'cub': 200, 'cars': 196, 'flowers': 102, 'wikiart': 195, 'sketches': 250, 'cifar10': 10, 'fashion_mnist': 10,
    'decathlon/aircraft': 100, 'decathlon/cifar100': 100, 'decathlon/daimlerpedcls': 2, 'decathlon/dtd': 47,
    'decathlon/gtsrb': 43, 'decathlon/omniglot': 1623, 'decathlon/svhn': 10, 'decathlon/ucf101': 101,
    'decathlon/vgg-flowers': 102,
}


def classes(component):
    return component.classes or CLASSES.get(component.dataset) or CLASSES[component.name]


@pytest.mark.parametrize('name', FINE_TUNED)
def test_a_tag_is_what_its_recipe_says(name):
    variant, _, tag = name.partition('.')
    values, sections = read_config(recipe_path(name), build_parser())
    tuned, cfg = FINE_TUNED[name], timm.get_pretrained_cfg(name)
    assert values['model'] == variant and values.get('model_kwargs', {}) == tuned.model_args
    assert sections['card']['repo_id'] == cfg.hf_hub_id == f'{OWNER}/{name}'
    assert sections['card']['license'] == cfg.license == tuned.license
    assert sections['card'].get('published', False) == tuned.published
    assert sum(map(classes, DataSpec.from_mapping(sections['data']).components)) == cfg.num_classes
    assert cfg.tag == tag


@pytest.mark.parametrize('name', {(n.partition('.')[0], str(t.model_args)): n for n, t in FINE_TUNED.items()}.values())
def test_images_are_prepared_as_for_the_model_that_the_recipe_trains(name):
    variant = name.partition('.')[0]
    values, cfg = read_config(recipe_path(name), build_parser())[0], timm.get_pretrained_cfg(name)
    with torch.device('meta'):
        trained = timm.create_model(variant, num_classes=cfg.num_classes, **values.get('model_kwargs', {}))
        model = timm.create_model(name)
    for key in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'first_conv', 'classifier', 'pool_size'):
        assert model.pretrained_cfg[key] == trained.pretrained_cfg[key], key
        if key != 'pool_size':
            assert getattr(cfg, key) == trained.pretrained_cfg[key], key
    assert model.num_classes == cfg.num_classes
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    assert shapes == {k: v.shape for k, v in trained.state_dict().items()}


def test_each_recipe_of_ours_with_a_hub_id_has_a_tag():
    ours = set()
    for name in list_recipes():
        values, sections = read_config(recipe_path(name), build_parser())
        arch = values['model'].partition('.')[0]
        if 'repo_id' in sections.get('card', {}) and arch in timm.list_models(module=['amf', 'spottune', 'decathlon']):
            ours.add(name)
    assert ours == set(FINE_TUNED)


def test_what_timm_lists():
    listed = timm.list_pretrained(['amf*', 'multitune*', 'spottune*'])
    assert len(listed) == len(set(listed)) and 'amf_inception_v4x2.in1k' in listed
    assert not set(FINE_TUNED) & set(listed)  # none is published; all are there by name
    assert set(FINE_TUNED) <= set(timm.list_models(include_tags=True))
    assert 'spottune_resnet26.in1k' not in listed  # its networks have no weights of their own
    for variant in timm.list_models(module=['amf', 'spottune']):
        assert timm.get_pretrained_cfg(variant).tag == 'in1k'
    assert timm.is_model_pretrained('amf_inception_v4x2') and not timm.is_model_pretrained('spottune_resnet26')


def test_the_default_tag_is_built_as_before():
    with torch.device('meta'):
        default, tagged = timm.create_model('spottune_resnet26'), timm.create_model(SMALL)
        other = timm.create_model(SMALL, first_block=2, num_classes=7)
    assert [len(m.blocks_tuned) for m in (default, tagged, other)] == [12, 8, 10]
    assert other.num_classes == 7
    # What a checkpoint has to say so that the model can be built again.
    args = timm.models.get_model_args
    assert args(tagged).items() >= {'first_block': 4, 'temperature': 5.0, 'num_classes': 2}.items()
    assert args(other).items() >= {'first_block': 2, 'temperature': 5.0, 'num_classes': 7}.items()
    assert not {'first_block', 'temperature'} & set(args(default))


@pytest.mark.parametrize('name', ['amf_inception_v4x2.aircraft_dtd', SMALL])
def test_not_published(name, client):
    with pytest.raises(UserError) as e:
        timm.create_model(name, pretrained=True, cache_dir=client / 'hub')
    message = str(e.value)
    assert '\n' not in message and f"'{name}' is not published yet" in message
    assert f'timm-amf train --config {name} ' in message and 'timm-amf publish RUN --repo-id' in message
    assert f'--license {FINE_TUNED[name].license}' in message and name in list_recipes()


@pytest.mark.parametrize('published, offline, message', [
    (False, True, 'is not published yet .*as far as this version knows.* --config'),
    (True, True, 'go online once'),
    (True, False, 'are not at Hub repository'),
])
def test_why_there_are_no_weights(client, monkeypatch, published, offline, message):
    monkeypatch.setitem(FINE_TUNED, SMALL, replace(FINE_TUNED[SMALL], published=published))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', offline)
    with pytest.raises(UserError, match=message) as e:
        timm.create_model(SMALL, pretrained=True, cache_dir=client / 'hub')
    assert ('not published' in str(e.value)) == (not published) and '\n' not in str(e.value)


@pytest.fixture(scope='module')
def trained():
    """Another's network of the tag, and its file."""
    model = timm.create_model('spottune_resnet26', num_classes=2, first_block=4, temperature=5.).eval()
    for name, buffer in model.named_buffers():
        if name.endswith('running_mean'):
            buffer.normal_()
    return model, save(model.state_dict())


def test_published(client, hub, trained, monkeypatch):
    model, weights = trained
    hub.put(f'{OWNER}/{SMALL}', {'model.safetensors': weights}, large=['model.safetensors'])
    found = timm.create_model(SMALL, pretrained=True, cache_dir=client / 'hub').eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(found(x), model(x))
    # Nothing of its networks' own was asked for.
    assert {path.split('/resolve/')[0] for _, path, _ in hub.requests} == {f'/{OWNER}/{SMALL}'}
    # Its features for other classes, and again from the cache without the Hub.
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    other = timm.create_model(SMALL, pretrained=True, num_classes=5, cache_dir=client / 'hub').eval()
    assert other(x).shape == (2, 5)
    with torch.no_grad():
        assert torch.equal(other.forward_features(x), model.forward_features(x))
    # The cfg itself, as timm.get_pretrained_cfg gives it, means the same.
    again = timm.create_model(
        'spottune_resnet26', pretrained=True, pretrained_cfg=timm.get_pretrained_cfg(SMALL), cache_dir=client / 'hub')
    with torch.no_grad():
        assert torch.equal(again.eval()(x), model(x))


def test_what_is_trained_from_a_tag_and_published_is_the_tag(client, hub, trained, folders, tmp_path):  # noqa: F811
    model, weights = trained
    hub.put(f'{OWNER}/{SMALL}', {'model.safetensors': weights}, large=['model.safetensors'])
    run = train('again', tmp_path, [
        '--model', SMALL, '--pretrained', '--component', f'name=pedestrians,path={folders / "blobs"}', '--img-size',
        '32', '-b', '9', '--epochs', '1', '--lr', '1e-9', '--warmup-epochs', '0', '--workers', '0', '--cpu',
        '--tracker', 'none', '--no-check-images'])
    timm_amf.publish(run, f'{OWNER}/{SMALL}', FINE_TUNED[SMALL].license)
    config = json.loads(hub.files(f'{OWNER}/{SMALL}')['config.json'])
    assert config['architecture'] == 'spottune_resnet26' and config['model_args'].items() >= {'first_block': 4}.items()
    assert not config['pretrained_cfg'].get('tag')
    loaded = timm_amf.load(f'{OWNER}/{SMALL}', cache_dir=client / 'hub')
    assert len(loaded.blocks_tuned) == 8
    # Of an LR of almost nothing: it started from the weights of the tag, classifier and policy too.
    start = dict(model.named_parameters())
    assert all(torch.allclose(p, start[n], atol=1e-5) for n, p in loaded.named_parameters())
    tagged = timm.create_model(SMALL, pretrained=True, cache_dir=client / 'hub').eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(tagged(x), loaded(x))
        levels = timm.create_model(SMALL, pretrained=True, features_only=True, cache_dir=client / 'hub').eval()(x)
        assert torch.equal(levels[-1], loaded.forward_intermediates(x, intermediates_only=True)[-1])


def test_no_pickle_is_loaded(client, hub, tmp_path):
    torch.save({}, tmp_path / 'weights.bin')
    hub.put(f'{OWNER}/{SMALL}', {'pytorch_model.bin': (tmp_path / 'weights.bin').read_bytes()})
    with pytest.raises(UserError, match='has no model.safetensors'):
        timm.create_model(SMALL, pretrained=True, cache_dir=client / 'hub')
    assert not any(path.endswith('.bin') for _, path, _ in hub.requests)


def test_a_repository_with_other_weights(client, hub):
    weights = save(timm.create_model('spottune_resnet26', num_classes=2).state_dict())  # all blocks routed
    hub.put(f'{OWNER}/{SMALL}', {'model.safetensors': weights}, large=['model.safetensors'])
    with pytest.raises(UserError, match='does not fit spottune_resnet26') as e:
        timm.create_model(SMALL, pretrained=True, cache_dir=client / 'hub')
    assert '\n' not in str(e.value)


def test_a_private_or_gated_repository_is_not_said_to_be_missing(client, hub):
    hub.fault('HEAD', '/resolve/', status=403, headers={'X-Error-Code': 'GatedRepo'})
    with pytest.raises(UserError, match='GatedRepoError.*hf auth login'):
        timm.create_model(SMALL, pretrained=True, cache_dir=client / 'hub')
