"""Publishing to a Hub in trouble: the old revision stays whole, and the next try succeeds."""
import shutil

import pytest
from hub_runs import HUB_ERRORS
from huggingface_hub import constants
from loopback import TOKEN
from safetensors.torch import load, load_file, save_file

import timm_amf
from timm_amf import UserError
from timm_amf.cli import main
from timm_amf.engine.recipes import check_repo_id

REPO = 'org/birds'
STAGES = {
    'create': r'/api/repos/create',
    'validate': r'/api/validate-yaml',
    'preupload': r'/preupload/',
    'batch': r'/lfs/objects/batch',
    'put': r'/lfs-store/',
    'commit': r'/commit/',
}


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    monkeypatch.setattr('time.sleep', lambda seconds: None)


@pytest.fixture
def new_run(runs, tmp_path):
    """A run whose weights nobody has seen."""
    run = tmp_path / 'run'
    shutil.copytree(runs('plain'), run)
    state = load_file(run / 'model_best.safetensors')
    state['fc.bias'] += 1
    save_file(state, run / 'model_best.safetensors', metadata={'format': 'pt'})
    return run


def publish(run, **kwargs):
    return timm_amf.publish(run, REPO, 'mit', **kwargs)


@pytest.mark.parametrize('stage,kind', [
    *((stage, kind) for stage in STAGES for kind in (500, 'drop')),
    *((stage, 403) for stage in STAGES if stage != 'create'),  # who may not make it may still write what is there
    ('commit', 401),
])
def test_the_old_revision_stays_whole_and_the_next_try_succeeds(client, hub, runs, new_run, stage, kind):
    publish(runs('plain'))
    before, messages = hub.files(REPO), hub.messages(REPO)
    hub.fault('PUT' if stage == 'put' else 'POST', STAGES[stage], **_fault(kind))
    with pytest.raises(HUB_ERRORS) as error:
        publish(new_run)
    assert TOKEN not in str(error.value)
    assert hub.files(REPO) == before and hub.messages(REPO) == messages

    hub.faults.clear()
    publish(new_run)
    assert len(hub.messages(REPO)) == len(messages) + 1
    sent = load(hub.files(REPO)['model.safetensors'])['fc.bias']
    assert sent.equal(load_file(new_run / 'model_best.safetensors')['fc.bias'])


def _fault(kind):
    return dict(drop=True) if kind == 'drop' else dict(status=kind, body=b'{}')


@pytest.mark.parametrize('stage,kind', [('create', 'drop'), ('put', 'drop'), ('put', 500), ('commit', 403)])
def test_the_command_says_it_in_one_line(client, hub, runs, capsys, stage, kind):
    hub.fault('PUT' if stage == 'put' else 'POST', STAGES[stage], **_fault(kind))
    assert main(['publish', str(runs('plain')), '--repo-id', REPO, '--license', 'mit']) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert 'timm-amf publish: error: ' in error and REPO in error and TOKEN not in error


def test_a_repository_that_may_not_be_made(client, hub, runs):
    hub.fault('POST', '/api/repos/create', status=403, body=b'{}')
    with pytest.raises(HUB_ERRORS):
        publish(runs('plain'))
    assert hub.repos == {}


def test_what_was_sent_is_not_sent_again(client, hub, runs):
    hub.fault('POST', '/commit/', status=403)
    with pytest.raises(HUB_ERRORS):
        publish(runs('plain'))
    puts = [path for verb, path, _ in hub.requests if verb == 'PUT']
    assert len(puts) == 1
    hub.faults.clear()
    publish(runs('plain'))
    assert [path for verb, path, _ in hub.requests if verb == 'PUT'] == puts
    assert 'model.safetensors' in hub.files(REPO)


@pytest.mark.parametrize('stage,kind', [('token', 403), ('commit', 403), ('commit', 'drop')])
def test_over_xet(client, hub, runs, new_run, monkeypatch, stage, kind):
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', False)
    publish(runs('plain'))
    before = dict(hub.repos[REPO].refs)
    verb, path = ('GET', 'xet-write-token') if stage == 'token' else ('POST', '/commit/')
    hub.fault(verb, path, **_fault(kind))
    with pytest.raises(HUB_ERRORS) as error:
        publish(new_run)
    assert TOKEN not in str(error.value) and hub.repos[REPO].refs == before
    hub.faults.clear()
    publish(new_run)
    assert hub.repos[REPO].refs != before and hub.transports == {'xet'}
    assert len(hub.messages(REPO)) == 3  # with the initial one: one commit each


@pytest.mark.parametrize('name', ('birds', 'a/b/c', '../b', 'a/b.git', 'a/', '/b', '', 'a/b c', 'a/' + 'b' * 100))
def test_names_that_are_none(name):
    with pytest.raises(UserError, match='OWNER/NAME'):
        check_repo_id(name)
    check_repo_id('org/amf_inception_v4x2.aircraft-dtd')
