"""`timm-amf models`: what is there, and what is published."""
import pytest
import timm
import torch
from huggingface_hub import constants

from timm_amf.cli import main
from timm_amf.engine import listing
from timm_amf.engine.config_file import list_recipes
from timm_amf.models.tags import FINE_TUNED, OWNER


def blocks(text):
    """The tables by the first word of their head: name -> cells of the row."""
    tables = {}
    for block in text.strip().split('\n\n'):
        head, *rows = block.splitlines()
        if '  ' in head:
            tables[head.split()[0]] = {row.split()[0]: row for row in rows}
    return tables


@pytest.fixture
def run(capsys):
    def _run(*argv, code=0):
        assert main(['models', *argv]) == code
        captured = capsys.readouterr()
        return captured.err if code else blocks(captured.out)
    return _run


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError('the Hub was asked')
    monkeypatch.setattr(listing.HfApi, 'model_info', refuse)


def test_all(run, no_network):
    found = run()
    names = {n for module in ('amf', 'spottune', 'decathlon') for n in timm.list_models(module=module)}
    assert set(found['model']) == names and set(found['recipe']) == set(list_recipes())
    assert set(found['tag']) == {*FINE_TUNED, *(n for n in timm.list_pretrained() if n.split('.')[0] in names)}
    for tag in FINE_TUNED:
        assert found['tag'][tag].split()[1:] == ['no', f'{OWNER}/{tag}']
    assert {row.split()[1] for row in found['recipe'].values()} == {'no', '-'}
    with torch.device('meta'):
        count = sum(p.numel() for p in timm.create_model('amf_inception_v4x2').parameters())
    assert found['model']['amf_inception_v4x2'].split()[1:] == [
        f'{count:,}', '3x299x299', 'inception_v4,', 'inception_v4', '+', 'resnet34']


def test_filter(run, no_network):
    found = run('amf_inception_v4x2')
    assert list(found['model']) == ['amf_inception_v4x2']
    assert list(found['tag'])[0] == 'amf_inception_v4x2.in1k'
    row = found['tag']['amf_inception_v4x2.in1k']
    assert '(default)' in row and row.endswith('timm/inception_v4.tf_in1k, timm/resnet34.a1_in1k')
    assert set(found['tag']) == set(timm.list_models('amf_inception_v4x2.*', include_tags=True))
    assert found['recipe']['amf_inception_v4x2.aircraft_dtd'].split(maxsplit=3)[1:] == [
        'no', 'amf', 'aircraft 93.01 ± 0.2, dtd 76.91 ± 0.2']
    found = run('*.cub')
    assert set(found['tag']) == set(found['recipe']) == {'spottune_resnet50.cub'}
    assert set(found['model']) == {'spottune_resnet50'}
    found = run('inception_v4.dtd_*')  # timm's own architecture: recipes alone
    assert set(found) == {'recipe'} and set(found['recipe']) == {'inception_v4.dtd_default', 'inception_v4.dtd_optimal'}
    found = run('spottune_resnet26')
    assert 'spottune_resnet26.in1k' not in found['tag'] and len(found['tag']) == 9  # no weights of its networks


def test_mistakes(run):
    assert run('spottune_resnet5', code=2) == (
        'timm-amf models: error: spottune_resnet5: no such model, tag or recipe, did you mean spottune_resnet50?\n')
    assert run('--chek', code=2).count('\n') == 1


def test_check_asks_the_hub(run, client, hub):
    hub.put(f'{OWNER}/spottune_resnet50.cub', {'config.json': b'{}'})
    hub.put(f'{OWNER}/spottune_resnet50.cars', {'config.json': b'{}'})
    hub.repos[f'{OWNER}/spottune_resnet50.cars'].private = True
    found = run('spottune_resnet50', '--check')
    for table in ('tag', 'recipe'):
        states = {name: row.split()[1] for name, row in found[table].items() if name in FINE_TUNED}
        assert states == {
            'spottune_resnet50.cub': 'yes', 'spottune_resnet50.cars': 'private', 'spottune_resnet50.flowers': 'no',
            'spottune_resnet50.wikiart': 'no', 'spottune_resnet50.sketches': 'no'}
    asked = [path for _, path, _ in hub.requests if path.startswith('/api/models/')]
    assert len(asked) == len(set(asked)) == 5  # each repository once, in one table or two


def test_no_network(run, client, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert run('*.cub')['tag']
    error = run('*.cub', '--check', code=2)
    assert error.count('\n') == 1 and 'offline mode' in error
