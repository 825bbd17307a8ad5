"""Publishing to a Hub in trouble: a second try where it helps, one line where not, and the old revision whole."""
import re
import shutil

import pytest
from huggingface_hub import constants
from loopback import TOKEN
from safetensors.torch import load_file, save_file

import timm_amf
from timm_amf import UserError
from timm_amf.hub.client import check_repo_id, hub_errors, patiently

REPO = 'org/birds'
STAGES = {
    'create': r'/api/repos/create',
    'validate': r'/api/validate-yaml',
    'preupload': r'/preupload/',
    'batch': r'/lfs/objects/batch',
    'put': r'/lfs-store/',
    'commit': r'/commit/',
}


def method(stage):
    return 'PUT' if stage == 'put' else 'POST'


@pytest.fixture
def waits(monkeypatch):
    """Seconds that somebody wanted to wait; nobody does."""
    seconds = []
    monkeypatch.setattr('time.sleep', seconds.append)
    return seconds


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
    ('preupload', 401), ('preupload', 404), ('commit', 401), ('commit', 404),
])
def test_the_old_revision_stays_whole_and_the_next_try_succeeds(client, hub, runs, new_run, waits, stage, kind):
    publish(runs('plain'))
    before, messages = hub.files(REPO), hub.messages(REPO)
    messages_of = {
        401: r'does not accept your token \(401\)|no such repository', 403: r'your token may not write it \(403\)',
        404: r'404', 500: r'in trouble \(500\)', 'drop': 'broke off',
    }
    fault = dict(drop=True) if kind == 'drop' else dict(
        status=kind, body=b'{}', headers={'X-Error-Message': 'Invalid credentials in Authorization header'})
    hub.fault(method(stage), STAGES[stage], **fault)
    with pytest.raises(UserError) as error:
        publish(new_run)
    text = str(error.value)
    assert text.startswith(f'{REPO}: ') and '\n' not in text and TOKEN not in text
    assert re.search(messages_of[kind], text), text
    assert hub.files(REPO) == before and hub.messages(REPO) == messages

    hub.faults.clear()
    publish(new_run)
    assert len(hub.messages(REPO)) == len(messages) + 1
    assert hub.files(REPO)['model.safetensors'] == (new_run / 'model_best.safetensors').read_bytes()


def test_a_repository_that_may_not_be_made(client, hub, runs, waits):
    hub.fault('POST', '/api/repos/create', status=403, body=b'{}')
    with pytest.raises(UserError, match='^org/birds: there is no such repository|may not write it'):
        publish(runs('plain'))
    assert hub.repos == {}


@pytest.mark.parametrize('stage,kind', [
    *((stage, kind) for stage in STAGES for kind in (429, 'drop')), ('create', 500), ('commit', 503)])
def test_a_trouble_that_passes_is_waited_for(client, hub, runs, waits, stage, kind):
    fault = dict(drop=True) if kind == 'drop' else dict(status=kind, body=b'{}', headers={'Retry-After': '11'})
    hub.fault(method(stage), STAGES[stage], times=2, **fault)
    publish(runs('plain'))
    assert len(hub.messages(REPO)) == 2 and 'model.safetensors' in hub.files(REPO)
    asked = 11 if kind == 429 else 0
    assert len(waits) == 2 and min(waits) >= asked


@pytest.mark.parametrize('stale', (False, True))
def test_a_commit_whose_answer_was_lost_is_one_commit(client, hub, runs, waits, stale):
    """The Hub took it, the answer did not come: the second try finds nothing left to do, nor to remove."""
    if stale:
        hub.put(REPO, {'figures/old.png': b'old'})
    fault = hub.fault('POST', '/commit/', lose=True, times=1)
    address = publish(runs('plain'))
    assert fault.seen == 1 and len(waits) == 1
    assert len(hub.messages(REPO)) == 2 + stale and address.endswith(hub.repos[REPO].refs['main'])
    assert 'figures/old.png' not in hub.files(REPO)


def test_what_was_sent_is_not_sent_again(client, hub, runs, waits):
    hub.fault('POST', '/commit/', status=403)
    with pytest.raises(UserError):
        publish(runs('plain'))
    puts = [path for verb, path, _ in hub.requests if verb == 'PUT']
    assert len(puts) == 1
    hub.faults.clear()
    publish(runs('plain'))
    assert [path for verb, path, _ in hub.requests if verb == 'PUT'] == puts
    assert 'model.safetensors' in hub.files(REPO)


@pytest.mark.parametrize('stage,kind', [('token', 403), ('commit', 403), ('commit', 'drop')])
def test_over_xet(client, hub, runs, new_run, waits, monkeypatch, stage, kind):
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', False)
    publish(runs('plain'))
    before = dict(hub.repos[REPO].refs)
    verb, path = ('GET', 'xet-write-token') if stage == 'token' else ('POST', '/commit/')
    hub.fault(verb, path, **(dict(drop=True) if kind == 'drop' else dict(status=kind)))
    with pytest.raises(UserError) as error:
        publish(new_run)
    assert str(error.value).startswith(f'{REPO}: ') and '\n' not in str(error.value)
    assert TOKEN not in str(error.value) and hub.repos[REPO].refs == before
    hub.faults.clear()
    publish(new_run)
    assert hub.repos[REPO].refs != before and hub.transports == {'xet'}


# -- the pieces -------------------------------------------------------------------------------------------------------

class Answer(Exception):
    def __init__(self, status, headers=()):
        super().__init__(f'{status}\nmore')
        self.response = type('Response', (), dict(status_code=status, headers=dict(headers)))()


def test_patience_has_an_end(waits):
    tries = []

    def call():
        tries.append(1)
        raise Answer(503)

    with pytest.raises(Answer):
        patiently(call)
    assert len(tries) == 4 and waits == [1, 2, 4]


@pytest.mark.parametrize('error,tries', [
    (Answer(429, {'Retry-After': '3'}), 4), (Answer(429, {'Retry-After': '3600'}), 1), (Answer(403), 1),
    (Answer(400), 1), (ConnectionResetError(), 4), (ValueError('x'), 1), (FileNotFoundError('x'), 1),
])
def test_what_is_tried_again(waits, error, tries):
    calls = []

    def call():
        calls.append(1)
        raise error

    with pytest.raises(type(error)):
        patiently(call)
    assert len(calls) == tries and waits == ([3, 3, 3] if isinstance(error, Answer) else [1, 2, 4])[:tries - 1]


def test_the_cause_is_found_behind_other_errors():
    with pytest.raises(UserError, match=r'^org/a: your token may not write it \(403\)'):
        with hub_errors('org/a', 'write'):
            try:
                raise Answer(403)
            except Answer as e:
                raise RuntimeError("Error while uploading 'x' to the Hub.") from e
    with pytest.raises(UserError, match='^org/a: cannot read it: two lines$'):
        with hub_errors('org/a', 'read'):
            raise ValueError('two\nlines')
    with pytest.raises(UserError, match='^mine$'):
        with hub_errors('org/a', 'read'):
            raise UserError('mine')


@pytest.mark.parametrize('name', ('birds', 'a/b/c', '../b', 'a/b.git', 'a/', '/b', '', 'a/b c', 'a/' + 'b' * 100))
def test_names_that_are_none(name):
    with pytest.raises(UserError, match='OWNER/NAME'):
        check_repo_id(name)
    check_repo_id('org/amf_inception_v4x2.aircraft-dtd')
