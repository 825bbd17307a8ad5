import logging
import time

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

import timm_amf.models.sources as sources
from timm_amf.errors import UserError

HALF = (0.5, 0.5, 0.5)


@pytest.fixture
def weights(tmp_path):
    """Writes the weights of a randomly drawn ImageNet network and gives their path."""
    def write(name, num_classes=1000, **kwargs):
        path = tmp_path / f'{name}.safetensors'
        model = timm.create_model(name, num_classes=num_classes, **kwargs)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith('running_mean'):
                buffer.normal_()  # so that statistics count as well as parameters
        save_file(model.state_dict(), path)
        return str(path)
    return write


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An offline Hub cache: `hub(name)` puts a network into it, and everything else is out of reach."""
    cache = tmp_path / 'hub'
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)

    def add(name):
        repo = timm.get_pretrained_cfg(name).hf_hub_id
        folder = cache / f"models--{repo.replace('/', '--')}"
        snapshot = folder / 'snapshots' / ('0' * 40)
        snapshot.mkdir(parents=True)
        (folder / 'refs').mkdir()
        (folder / 'refs' / 'main').write_text('0' * 40)
        model = timm.create_model(name)
        save_file(model.state_dict(), snapshot / 'model.safetensors')
        return model.state_dict()

    add.cache = str(cache)
    return add


@pytest.fixture
def hub_loads(monkeypatch):
    """The repositories whose weights were read."""
    loads, original = [], timm.models._builder.load_state_dict_from_hf

    def record(model_id, *args, **kwargs):
        loads.append(model_id)
        return original(model_id, *args, **kwargs)

    monkeypatch.setattr(timm.models._builder, 'load_state_dict_from_hf', record)
    return loads


def same(network, state_dict, but=('fc.', 'head.', 'classifier.')):
    own = {k: v for k, v in network.state_dict().items() if not k.startswith(but)}
    return bool(own) and all(torch.equal(v, state_dict[k]) for k, v in own.items())


def test_each_architecture_is_loaded_once_from_its_own_repository(hub, hub_loads):
    resnet, vit, policy = (hub(n) for n in ('test_resnet', 'test_vit', 'test_efficientnet'))
    model = timm.create_model('amf', pretrained=True, backbones=('test_resnet', 'test_vit', 'test_resnet'),
                              policy='test_efficientnet', num_classes=5, cache_dir=hub.cache)
    assert sorted(hub_loads) == [
        'timm/test_efficientnet.r160_in1k', 'timm/test_resnet.r160_in1k', 'timm/test_vit.r160_in1k']
    assert same(model.branches[0], resnet) and same(model.branches[2], resnet) and same(model.branches[1], vit)
    assert same(model.policy.net, policy)
    assert model.branches[0].state_dict().keys() == model.branches[2].state_dict().keys()
    # Equal at the start, and not one network in two places.
    assert not {p.data_ptr() for p in model.branches[0].parameters()} & \
        {p.data_ptr() for p in model.branches[2].parameters()}


def test_nothing_is_read_without_pretrained(hub, hub_loads):
    timm.create_model('amf', backbones=('test_resnet',) * 2, policy='test_resnet')
    assert hub_loads == []


def test_branches_equal_the_plain_model(weights):
    """Local weights, named for each network, with their own statistics and arguments."""
    paths = weights('test_efficientnet', pad_type='same'), weights('test_resnet')
    overlay = dict(file=paths[0], mean=HALF, std=HALF)
    model = timm.create_model(
        'amf', pretrained=True, backbones=('test_efficientnet',) * 2, policy='test_resnet', num_classes=3,
        backbone_kwargs=dict(pad_type='same', pretrained_cfg_overlay=overlay),
        policy_kwargs=dict(pretrained_cfg_overlay=dict(file=paths[1])),
    ).eval()
    plain = timm.create_model('test_efficientnet', pretrained=True, pad_type='same', pretrained_cfg_overlay=overlay,
                              num_classes=0).eval()
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        for features in model.forward_branches(x):
            assert torch.equal(features, plain(x))
    assert model.pretrained_cfg['mean'] == HALF


def test_each_branch_from_its_own_weights(weights, tmp_path):
    """Two sets of weights of one architecture are one layout; equal arguments written unlike are two networks."""
    first = weights('test_resnet')
    second = str(tmp_path / 'second.safetensors')
    save_file(timm.create_model('test_resnet').state_dict(), second)
    overlays = [dict(pretrained_cfg_overlay=dict(file=f)) for f in (first, second)]
    model = timm.create_model('amf', pretrained=True, backbones=('test_resnet',) * 2, policy='test_resnet',
                              backbone_kwargs=overlays, policy_kwargs=overlays[0], num_classes=2)
    for branch, path in zip(model.branches, (first, second)):
        assert same(branch, timm.models.load_state_dict(path))
    assert model.has_maps
    alike = [dict(overlays[0], channels=(32, 48, 48, 96)), dict(overlays[0], channels=[32, 48, 48, 96])]
    model = timm.create_model('amf', pretrained=True, backbones=('test_resnet',) * 2, policy='test_resnet',
                              backbone_kwargs=alike, policy_kwargs=overlays[0], num_classes=2)
    assert model.branches[0] is not model.branches[1]


@pytest.mark.parametrize('in_chans', [1, 4])
def test_input_channels_are_adapted_as_timm_does(weights, in_chans):
    overlay = dict(pretrained_cfg_overlay=dict(file=weights('test_resnet')))
    model = timm.create_model('amf', pretrained=True, backbones=('test_resnet',) * 2, policy='test_resnet',
                              in_chans=in_chans, num_classes=2, backbone_kwargs=overlay, policy_kwargs=overlay)
    plain = timm.create_model('test_resnet', pretrained=True, in_chans=in_chans, **overlay)
    for network in (*model.branches, model.policy.net):
        assert torch.equal(network.conv1[0].weight, plain.conv1[0].weight)
    assert model.in_chans == in_chans and model(torch.randn(2, in_chans, 64, 64)).shape == (2, 2)


def composite(num_classes=4, **kwargs):
    return timm.create_model('amf', backbones=('test_resnet',) * 2, policy='test_efficientnet',
                             num_classes=num_classes, **kwargs)


@pytest.fixture
def checkpoint(tmp_path):
    model = composite()
    path = tmp_path / 'composite.safetensors'
    save_file(model.state_dict(), path)
    return str(path), model.state_dict()


@pytest.mark.parametrize('num_classes', [4, 6, 0])
def test_a_checkpoint_of_the_composite_needs_no_part(checkpoint, hub, hub_loads, caplog, num_classes):
    path, state_dict = checkpoint
    with caplog.at_level(logging.WARNING):
        model = composite(num_classes, pretrained=True, pretrained_cfg_overlay=dict(file=path))
    assert hub_loads == []
    loaded = model.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in state_dict.items() if not k.startswith('fc.'))
    kept = num_classes == 4 and torch.equal(loaded['fc.weight'], state_dict['fc.weight'])
    assert kept == (num_classes == 4)
    warned = [r.getMessage() for r in caplog.records if 'classifier' in r.getMessage()]
    assert len(warned) == (num_classes == 6) and all('4 classes' in w and '6' in w for w in warned)


def test_other_ways_to_a_composite_checkpoint(checkpoint, hub, hub_loads, tmp_path):
    path, state_dict = checkpoint
    model = composite(checkpoint_path=path)
    assert torch.equal(model.state_dict()['fc.weight'], state_dict['fc.weight'])
    model = composite(pretrained=True, pretrained_cfg_overlay=dict(state_dict=state_dict))
    assert torch.equal(model.state_dict()['fc.weight'], state_dict['fc.weight'])

    timm.models._hub.save_for_hf(model, tmp_path / 'saved', safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True)
    for k, v in again.state_dict().items():
        assert torch.equal(v, state_dict[k])
    assert hub_loads == []


def test_input_channels_of_a_composite_checkpoint(checkpoint):
    path, state_dict = checkpoint
    model = composite(pretrained=True, in_chans=1, pretrained_cfg_overlay=dict(file=path))
    for stem in ('branches.0.conv1.0.weight', 'branches.1.conv1.0.weight', 'policy.net.conv_stem.weight'):
        torch.testing.assert_close(model.state_dict()[stem], state_dict[stem].sum(1, keepdim=True))


def test_features_only_from_a_checkpoint(checkpoint, caplog):
    path, state_dict = checkpoint
    with caplog.at_level(logging.WARNING):
        model = composite(pretrained=True, features_only=True, pretrained_cfg_overlay=dict(file=path))
    stem = 'branches.0.conv1.0.weight'
    assert torch.equal(model.model.state_dict()[stem], state_dict[stem])
    assert not [r for r in caplog.records if 'classifier' in r.getMessage()]


def test_offline_fails_at_once(hub):
    start = time.perf_counter()
    with pytest.raises(UserError) as e:
        timm.create_model('amf_inception_v4x2', pretrained=True, cache_dir=hub.cache)
    assert time.perf_counter() - start < 5
    message = str(e.value)
    assert '\n' not in message
    assert all(w in message for w in ('inception_v4', 'timm/inception_v4.tf_in1k', 'pretrained=False', 'file'))


def test_unreachable_hub_fails_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, 'hf_hub_url', lambda *_, **__: 'http://127.0.0.1:9/nothing/listens/here')
    start = time.perf_counter()
    with pytest.raises(UserError, match='timm/test_resnet.r160_in1k'):
        timm.create_model('amf', pretrained=True, backbones=('test_resnet',) * 2, cache_dir=tmp_path)
    assert time.perf_counter() - start < 5


def test_one_missing_part_stops_before_any_is_loaded(hub, hub_loads):
    hub('test_resnet')
    with pytest.raises(UserError, match='test_vit'):
        timm.create_model('amf', pretrained=True, backbones=('test_resnet', 'test_vit'), policy='test_resnet',
                          cache_dir=hub.cache)
    assert hub_loads == []


def overlaid(path, name='test_resnet'):
    overlay = dict(pretrained_cfg_overlay=dict(file=str(path)))
    return timm.create_model('amf', pretrained=True, backbones=(name,) * 2, policy='test_resnet',
                             backbone_kwargs=overlay, policy_kwargs=overlay)


def test_wrong_weights_are_named(weights, checkpoint, tmp_path):
    other = weights('test_vit')
    with pytest.raises(UserError, match='does not hold the weights of .test_resnet'):
        overlaid(other)
    with pytest.raises(UserError, match='cannot load the weights of .test_vit2'):
        overlaid(weights('test_vit3'), 'test_vit2')
    (tmp_path / 'text.safetensors').write_text('no weights at all')
    with pytest.raises(UserError, match='text.safetensors'):
        overlaid(tmp_path / 'text.safetensors')
    with pytest.raises(UserError, match='does not exist'):
        overlaid(tmp_path / 'missing.safetensors')
    with pytest.raises(UserError, match='no checkpoint of amf'):
        composite(pretrained=True, pretrained_cfg_overlay=dict(file=other))
    with pytest.raises(UserError, match='does not exist'):
        composite(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'missing.safetensors')))
    with pytest.raises(UserError, match='does not fit amf: it has .*branches.1'):
        timm.create_model('amf', pretrained=True, backbones=('test_resnet',) * 2, policy='test_efficientnet',
                          backbone_kwargs=[{}, {'stem_width': 8}],
                          pretrained_cfg_overlay=dict(file=checkpoint[0]))


def test_no_weights_anywhere():
    with pytest.raises(UserError, match='no pretrained weights for .test_maxvit'):
        timm.create_model('amf', pretrained=True, backbones=('test_maxvit',) * 2)


def test_a_policy_trained_for_as_many_branches_keeps_its_classifier(weights):
    path = weights('test_resnet', num_classes=2)
    overlay = dict(pretrained_cfg_overlay=dict(file=path, num_classes=2))
    model = timm.create_model('amf', pretrained=True, backbones=('test_resnet',) * 2, policy='test_resnet',
                              backbone_kwargs=overlay, policy_kwargs=overlay)
    assert same(model.policy.net, timm.models.load_state_dict(path), but=())


def test_parameters_that_are_not_in_the_file_are_named(weights, tmp_path, caplog):
    """timm drops them without a word, as for a classifier of other classes; its own log level stays as it was."""
    path = tmp_path / 'partial.safetensors'
    state_dict = timm.models.load_state_dict(weights('test_resnet'))
    save_file({k: v for k, v in state_dict.items() if k != 'layer2.0.bn1.weight'}, path)
    level = logging.getLogger('timm.models._builder').level
    with caplog.at_level(logging.WARNING, 'timm_amf'):
        model = overlaid(path)
    assert "1 parameters of 'test_resnet' are not in" in caplog.text and 'layer2.0.bn1.weight' in caplog.text
    assert same(model.branches[0], state_dict, but=('fc.', 'layer2.0.bn1.'))
    assert logging.getLogger('timm.models._builder').level == level
