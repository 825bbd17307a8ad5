"""Publishing to a Hub in trouble: the old revision stays whole, and the next try succeeds."""
import shutil

import pytest
from loopback import TOKEN
from safetensors.torch import load, load_file, save_file

import timm_amf
from timm_amf.cli import main
from timm_amf.errors import UserError

REPO = 'org/birds'
DROP, FAILS, FORBIDDEN = dict(drop=True), dict(status=500), dict(status=403)

pytestmark = pytest.mark.usefixtures('no_waits')


def publish(run):
    return timm_amf.publish(run, REPO, 'mit')


@pytest.mark.parametrize('method,path,fault', [
    ('POST', '/repos/create', DROP), ('POST', '/validate-yaml', FORBIDDEN), ('POST', '/preupload/', FAILS),
    ('POST', '/objects/batch', FAILS), ('PUT', '/lfs-store/', DROP), ('POST', '/commit/', DROP),
    ('POST', '/commit/', dict(status=401)),
])
def test_the_old_revision_stays_whole_and_the_next_try_succeeds(client, hub, runs, tmp_path, method, path, fault):
    run = tmp_path / 'run'
    shutil.copytree(runs('plain'), run)
    state = load_file(run / 'model_best.safetensors')
    state['fc.bias'] += 1
    save_file(state, run / 'model_best.safetensors', metadata={'format': 'pt'})
    hub.put(REPO, {'model.safetensors': b'old', 'README.md': b'old'}, large=['model.safetensors'])
    before, messages = hub.files(REPO), hub.messages(REPO)
    hub.fault(method, path, **fault)
    with pytest.raises(UserError) as error:
        publish(run)
    assert TOKEN not in str(error.value)
    assert hub.files(REPO) == before and hub.messages(REPO) == messages

    hub.faults.clear()
    sent = list(hub.lfs)
    publish(run)
    assert len(hub.messages(REPO)) == len(messages) + 1
    assert load(hub.files(REPO)['model.safetensors'])['fc.bias'].equal(state['fc.bias'])
    # Large files that arrived are not sent again.
    assert len(hub.lfs) == 1 and (path != '/commit/' or sent == list(hub.lfs))


@pytest.mark.parametrize('method,path,fault', [
    ('POST', '/repos/create', DROP), ('PUT', '/lfs-store/', DROP), ('PUT', '/lfs-store/', FAILS),
    ('POST', '/commit/', FORBIDDEN),
])
def test_the_command_says_it_in_one_line(client, hub, runs, capsys, method, path, fault):
    hub.fault(method, path, **fault)
    assert main(['publish', str(runs('plain')), '--repo-id', REPO, '--license', 'mit']) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert 'timm-amf publish: error: ' in error and REPO in error and TOKEN not in error


def test_a_repository_that_may_not_be_made(client, hub, runs):
    hub.fault('POST', '/repos/create', **FORBIDDEN)
    with pytest.raises(UserError):
        publish(runs('plain'))
    assert hub.repos == {}
