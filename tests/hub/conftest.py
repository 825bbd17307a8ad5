"""A loopback Hub, the client of this process turned to it, and small real runs."""
from pathlib import Path

import pytest
from hub_runs import FLAGS, folders, train  # noqa: F401  a fixture
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from loopback import TOKEN, LoopbackHub

import timm_amf


@pytest.fixture
def hub():
    with LoopbackHub() as server:
        yield server


@pytest.fixture
def client(hub, tmp_path, monkeypatch):
    """The client of this process talks to the loopback Hub, over LFS, with a token and an empty cache of its own."""
    home = tmp_path / 'hf-home'
    home.mkdir()
    (home / 'token').write_text(TOKEN)
    monkeypatch.setattr(constants, 'ENDPOINT', hub.url)
    monkeypatch.setattr(
        constants, 'HUGGINGFACE_CO_URL_TEMPLATE', hub.url + '/{repo_id}/resolve/{revision}/{filename}')
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(home / 'hub'))
    monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(home / 'token'))
    monkeypatch.setattr(constants, 'HF_STORED_TOKENS_PATH', str(home / 'stored_tokens'))
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
    for name in ('HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN'):
        monkeypatch.delenv(name, raising=False)
    close_session()
    yield home
    close_session()


@pytest.fixture(scope='session')
def runs(folders, tmp_path_factory):  # noqa: F811
    """Small runs, trained once: runs('amf'), 'multitune', 'spottune', 'global_k', 'plain'."""
    made, output = {}, tmp_path_factory.mktemp('runs')

    def _run(name) -> Path:
        if name not in made:
            data = [f'--component=name={c},path={folders / c}' for c in ('stripes', 'blobs')]
            data = ['--data-dir', str(folders / 'stripes')] if name == 'plain' else data
            made[name] = train(name, output, [*FLAGS[name], *data])
        return made[name]
    return _run


@pytest.fixture(scope='session')
def staged(runs, tmp_path_factory):
    """Published folders, written once: staged('amf')."""
    made = {}

    def _stage(name) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp('staged') / name
            timm_amf.publish(runs(name), f'org/{name}', 'mit', dry_run=made[name])
        return made[name]
    return _stage


@pytest.fixture
def no_waits(monkeypatch):
    """The client tries again at once."""
    monkeypatch.setattr('time.sleep', lambda seconds: None)
