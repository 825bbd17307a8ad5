"""A run published to the loopback Hub: what is sent, what is not, and what comes back."""
import json
import logging
import re
import shutil

import pytest
import timm
import torch
import yaml
from conftest_engine import rows
from hub_runs import PLAIN, train
from loopback import TOKEN
from safetensors.torch import load, load_file

import timm_amf
from timm_amf import Plan, UserError
from timm_amf.cli import main
from timm_amf.data import create_datasets, data_spec_from_args
from timm_amf.engine.run_folder import load_run, read_run
from timm_amf.hub.publish import _without_folders

REPO = 'org/birds'
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def publish(run, **kwargs):
    return timm_amf.publish(run, REPO, 'apache-2.0', **kwargs)


def model_of(run):
    """The model of a run with its best weights, in evaluation mode, without the code that publishes."""
    args = read_run(run)
    data = create_datasets(data_spec_from_args(args), ('train', 'val'), in_chans=3)[0]
    return load_run(args, run, data.num_classes)


# -- what is sent -----------------------------------------------------------------------------------------------------

def test_one_commit_holds_all_and_no_pickle(client, hub, runs, capsys):
    run = runs('amf')
    address = publish(run, message='weights of spring')
    assert hub.messages(REPO) == ['initial commit', 'weights of spring']
    assert address == f'{hub.url}/{REPO}/commit/{hub.repos[REPO].refs["main"]}'

    files = hub.files(REPO)
    assert set(files) == {
        'README.md', 'args.yaml', 'config.json', 'metrics.json', 'model.safetensors', 'plan.yaml', 'policy.csv',
        'summary.csv'}
    ours, theirs = load_file(run / 'model_best.safetensors'), load(files['model.safetensors'])
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert files['summary.csv'] == (run / 'summary.csv').read_bytes()
    assert Plan.from_dict(yaml.safe_load(files['plan.yaml'])['plan']) == Plan.from_yaml(run / 'plan.yaml')
    listed = capsys.readouterr().out
    assert all(f'{len(content):,}  {name}\n' in listed for name, content in files.items())

    config = json.loads(files['config.json'])
    assert config['architecture'] == 'amf' and config['num_classes'] == 5
    assert config['label_names'] == [
        'stripes/class0', 'stripes/class1', 'class2', 'blobs/class0', 'blobs/class1']
    assert config['model_args']['backbones'] == ['test_resnet'] * 2
    assert config['pretrained_cfg']['input_size'] == [3, 32, 32]
    assert config['pretrained_cfg']['license'] == 'apache-2.0' and not config['pretrained_cfg'].get('tag')
    assert config['timm_amf']['data'] == [
        dict(name='stripes', dataset='', classes=3, train=27, val=15),
        dict(name='blobs', dataset='', classes=2, train=18, val=10)]

    metrics = json.loads(files['metrics.json'])
    best = max(rows(run / 'summary.csv'), key=lambda row: float(row['eval_top1']))
    assert metrics['epoch'] == int(best['epoch'])
    assert {r['data']: r['top1'] for r in metrics['results']} == {
        '': float(best['eval_top1']), 'stripes': float(best['eval_top1_stripes']),
        'blobs': float(best['eval_top1_blobs'])}
    assert [r['images'] for r in metrics['results']] == [25, 15, 10]


def test_identical_logits_come_back(client, hub, runs, tmp_path, capsys):
    run = runs('amf')
    assert main(['publish', str(run), '--repo-id', REPO, '--license', 'apache-2.0']) == 0
    assert f'published: {hub.url}/{REPO}/commit/' in capsys.readouterr().out
    by_timm = timm.create_model(f'hf-hub:{REPO}', pretrained=True).eval()
    by_load = timm_amf.load(REPO, cache_dir=tmp_path / 'another')
    with torch.no_grad():
        expected = model_of(run)(IMAGES)
        assert torch.equal(by_timm(IMAGES), expected) and torch.equal(by_load(IMAGES), expected)


def test_publishing_again_updates(client, hub, runs, tmp_path):
    run = with_figure(runs('amf'), tmp_path / 'run', '')
    for name, columns in (('weights', 'epoch,weight_0'), ('errors', 'group,image,text')):
        (run / 'report' / f'{name}.png').write_bytes(b'png')
        (run / 'report' / f'{name}.csv').write_text(f'{columns}\n')
    publish(run)
    assert 'figures/weights.png' in hub.files(REPO) and 'figures/errors.png' not in hub.files(REPO)  # photographs
    hub.put(REPO, {'notes.txt': b'of the owner', 'figures/drawing.gif': b'of the owner'})
    assert hub.files(REPO)['figures/curves.svg'] == b'<svg></svg>'
    assert b'![curves](figures/curves.svg)' in hub.files(REPO)['README.md']
    commits = len(hub.messages(REPO))

    publish(run)
    assert len(hub.messages(REPO)) == commits  # nothing has changed

    (run / 'report' / 'curves.svg').unlink()
    (run / 'policy.csv').unlink()
    publish(run)
    assert len(hub.messages(REPO)) == commits + 1
    files = hub.files(REPO)
    assert 'policy.csv' not in files and 'figures/curves.svg' not in files
    assert files['notes.txt'] == files['figures/drawing.gif'] == b'of the owner'


def test_revision_privacy_and_card(client, hub, runs):
    run = runs('plain')
    publish(run, private=True, revision='trial')
    assert hub.repos[REPO].private
    assert hub.files(REPO) == {} and 'model.safetensors' in hub.files(REPO, 'trial')

    hub.put(REPO, {'README.md': b'---\nlicense: mit\n---\nmine'}, revision='trial')
    publish(run, revision='trial', keep_card=True)
    assert hub.files(REPO, 'trial')['README.md'].endswith(b'mine')
    publish(run, revision='trial')
    assert b'test_resnet' in hub.files(REPO, 'trial')['README.md']
    hub.put('org/public', {'README.md': b'old'})
    with pytest.raises(UserError, match='is there already and public'):
        timm_amf.publish(run, 'org/public', 'mit', private=True)
    assert hub.files('org/public') == {'README.md': b'old'}


def test_dry_run_writes_what_would_be_sent(client, hub, runs, tmp_path, capsys):
    run, folder = runs('amf'), tmp_path / 'staged'
    assert publish(run, dry_run=folder) is None
    assert hub.requests == [] and not list(tmp_path.glob('.*'))
    assert 'nothing was sent' in capsys.readouterr().out
    publish(run)
    assert {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*')} == hub.files(REPO)
    with pytest.raises(UserError, match='is not empty'):
        publish(run, dry_run=folder)


def test_a_dry_run_needs_no_login(client, runs, tmp_path):
    (client / 'token').unlink()
    publish(runs('plain'), dry_run=tmp_path / 'staged')
    assert (tmp_path / 'staged' / 'README.md').exists()
    with pytest.raises(UserError, match='hf auth login'):
        publish(runs('plain'))


# -- what is not ------------------------------------------------------------------------------------------------------

def test_the_token_is_nowhere(client, hub, runs, tmp_path, capfd, caplog):
    run, folder = runs('amf'), tmp_path / 'staged'
    with caplog.at_level(logging.DEBUG):
        publish(run, dry_run=folder)
        publish(run)
        hub.fault('POST', '/commit/', status=403)
        with pytest.raises(UserError) as error:
            timm_amf.publish(run, 'org/other', 'mit')
    assert hub.authorised > 5 and TOKEN not in str(error.value)
    printed = ''.join(capfd.readouterr())
    written = b''.join(p.read_bytes() for p in [*folder.rglob('*'), *run.rglob('*')] if p.is_file())
    sent = b''.join(hub.files(REPO).values())
    assert 'published' in printed and len(written) > 100_000
    assert TOKEN not in printed and TOKEN not in caplog.text
    assert TOKEN.encode() not in written and TOKEN.encode() not in sent


def with_figure(run, target, text):
    """A copy of the run with a report."""
    shutil.copytree(run, target)
    (target / 'report').mkdir()
    (target / 'report' / 'curves.svg').write_text(f'<svg>{text}</svg>')
    return target


def test_a_token_among_the_options_is_taken_out(client, hub, runs, tmp_path):
    run = tmp_path / 'run'
    shutil.copytree(runs('plain'), run)
    with open(run / 'args.yaml', 'a') as file:
        file.write(f'opt_kwargs: {{note: {TOKEN}}}\n')
    publish(run)
    assert TOKEN.encode() not in b''.join(hub.files(REPO).values())


@pytest.mark.parametrize('token', (TOKEN, 'of-another-shape'))
def test_a_token_elsewhere_is_refused(client, hub, runs, tmp_path, token):
    (client / 'token').write_text(token)
    run = with_figure(runs('plain'), tmp_path / 'run', token)
    with pytest.raises(UserError, match='curves.svg: holds an access token'):
        publish(run, dry_run=tmp_path / 'staged')
    assert hub.requests == [] and not (tmp_path / 'staged').exists()


def test_no_folder_of_this_machine_is_published(staged, runs, folders):
    for name in ('amf', 'plain'):
        assert str(folders) in (runs(name) / 'args.yaml').read_text()
        published = b''.join(p.read_bytes() for p in staged(name).iterdir())
        assert str(folders).encode() not in published and str(runs(name).parent).encode() not in published


@pytest.mark.parametrize('value,public', [
    ('/home/me/data/pets', 'pets'), ('~/data/pets/', 'pets'), ('../data/my pets', 'my pets'),
    (r'C:\data\pets', 'pets'), ('name=a,path=/x/y,classes=3', 'name=a,path=y,classes=3'),
    ('hfds//home/me/pets', 'hfds/pets'), ('hfds/org/pets', 'hfds/org/pets'), ('torch/dtd', 'torch/dtd'),
    ("('resnet18', 'resnet50')", "('resnet18', 'resnet50')"), ('rand-m9-mstd0.5', 'rand-m9-mstd0.5'), ('', ''),
    (TOKEN, '***'), (f'x={TOKEN}', 'x=***'),
])
def test_what_is_left_of_folders(value, public):
    assert _without_folders(value) == public and _without_folders({'a': [value]}) == {'a': [public]}


def test_the_published_options_train_the_same_again(staged, runs, folders, tmp_path):
    run = runs('amf')
    data = [f'--component=name={name},path={folders / name}' for name in ('stripes', 'blobs')]
    again = train('again', tmp_path, ['--config', str(staged('amf') / 'args.yaml'), *data])
    ours, theirs = (load_file(folder / 'model_best.safetensors') for folder in (run, again))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert Plan.from_yaml(again / 'plan.yaml') == Plan.from_yaml(run / 'plan.yaml')


def test_what_does_not_come_back_is_not_published(client, hub, folders, tmp_path):
    run = train('eps', tmp_path, [*PLAIN, '--data-dir', str(folders / 'stripes'), '--bn-eps', '0.5'])
    with pytest.raises(UserError, match='does not come back .* --bn-eps'):
        publish(run)
    assert REPO not in hub.repos


# -- SpotTune ---------------------------------------------------------------------------------------------------------

def test_fixed_blocks_are_published_with_the_weights(staged, runs):
    ours = model_of(runs('global_k'))
    chosen = ours.chosen_blocks(1)
    ours.set_blocks(chosen)
    model = timm_amf.load(staged('global_k'))
    assert model.fixed_blocks == chosen
    assert f'model.set_blocks({list(chosen)})' in (staged('global_k') / 'README.md').read_text()
    with torch.no_grad():
        assert torch.equal(model(IMAGES), ours(IMAGES))


def test_evaluated_blocks_are_published_too(runs, tmp_path):
    run = tmp_path / 'run'
    shutil.copytree(runs('spottune'), run)
    with open(run / 'args.yaml', 'a') as file:
        file.write("eval_blocks: '0,2'\n")
    publish(run, dry_run=tmp_path / 'staged')
    assert timm_amf.load(tmp_path / 'staged').fixed_blocks == (0, 2)
    assert timm_amf.load(tmp_path / 'staged', features_only=True).model.fixed_blocks == (0, 2)


def test_spare_outputs_have_no_names(folders, tmp_path):
    run = train('spare', tmp_path, [*PLAIN, '--data-dir', str(folders / 'stripes'), '--num-classes', '9'])
    publish(run, dry_run=tmp_path / 'staged')
    config = json.loads((tmp_path / 'staged' / 'config.json').read_text())
    assert config['num_classes'] == 9 and 'label_names' not in config


def test_grey_images(folders, tmp_path):
    run = train('grey', tmp_path, [*PLAIN, '--data-dir', str(folders / 'stripes'), '--in-chans', '1'])
    publish(run, dry_run=tmp_path / 'staged')
    cfg = timm_amf.load(tmp_path / 'staged').pretrained_cfg
    assert tuple(cfg['input_size']) == (1, 32, 32) and cfg['mean'] == [0.5]
    assert "convert('L')" in (tmp_path / 'staged' / 'README.md').read_text()


def test_compact_needs_this_package_no_more(client, hub, runs):
    run = runs('global_k')
    publish(run, compact=True)
    config = json.loads(hub.files(REPO)['config.json'])
    assert config['architecture'] == 'test_resnet' and config['timm_amf']['trained'] == 'spottune'
    card = hub.files(REPO)['README.md'].decode()
    assert 'import timm_amf' not in card and 'library_name: timm\n' in card
    plain, ours = timm.create_model(f'hf-hub:{REPO}', pretrained=True).eval(), model_of(run)
    ours.set_blocks(ours.chosen_blocks(1))
    with torch.no_grad():
        torch.testing.assert_close(plain(IMAGES), ours(IMAGES), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', ('spottune', 'plain'))
def test_compact_is_for_global_k(runs, name, tmp_path):
    with pytest.raises(UserError, match='--global-k'):
        publish(runs(name), compact=True, dry_run=tmp_path / 'staged')
    assert not (tmp_path / 'staged').exists()


# -- the train script and the verb ------------------------------------------------------------------------------------

def test_training_publishes_when_it_is_done(client, hub, folders, tmp_path, capsys):
    flags = [*PLAIN, '--data-dir', str(folders / 'stripes'), '--publish', REPO, '--publish-license', 'mit',
             '--publish-private', '--publish-message', 'fresh']
    run = train('fresh', tmp_path, flags)
    assert hub.messages(REPO) == ['initial commit', 'fresh'] and hub.repos[REPO].private
    files = hub.files(REPO)
    assert 'model.safetensors' in files and (run / 'model_best.safetensors').exists()
    assert b'publish' not in files['args.yaml']  # else who repeats the run would publish, too
    out = capsys.readouterr().out
    assert out.index('done in') < out.index('published:')


@pytest.mark.parametrize('flags,message', [
    (['--publish', REPO], '--publish-license'),
    (['--publish', 'birds', '--publish-license', 'mit'], 'OWNER/NAME'),
    (['--publish', REPO, '--publish-license', 'My Licence!'], 'licence'),
    (['--publish', REPO, '--publish-license', 'mit'], 'hf auth login'),
])
def test_training_does_not_begin_what_cannot_be_published(client, folders, tmp_path, flags, message):
    (client / 'token').unlink()
    with pytest.raises(UserError, match=message):
        train('never', tmp_path, [*PLAIN, '--data-dir', str(folders / 'stripes'), *flags])
    assert not (tmp_path / 'never').exists()


def test_a_run_that_cannot_be_published_is_whole(client, hub, folders, tmp_path):
    hub.fault('POST', '/commit/', status=403)
    flags = [*PLAIN, '--data-dir', str(folders / 'stripes'), '--publish', REPO, '--publish-license', 'mit']
    with pytest.raises(UserError, match='timm-amf publish .*whole --repo-id org/birds --license mit'):
        train('whole', tmp_path, flags)
    hub.faults.clear()
    publish(tmp_path / 'whole')
    assert 'model.safetensors' in hub.files(REPO)


@pytest.mark.parametrize('flags,message', [
    (['RUN', '--repo-id', REPO], r'--license: is missing'),
    (['RUN', '--repo-id', REPO, '--license', 'other'], r'--license-name'),
    (['RUN', '--repo-id', 'a/b/c', '--license', 'mit'], r"'a/b/c' cannot be a repository"),
    (['nowhere', '--repo-id', REPO, '--license', 'mit'], r'nowhere: no such file or folder'),
    (['RUN', '--repo-id', REPO, '--license', 'mit', '--results', 'none.csv'], r'none.csv: no such file'),
    (['RUN', '--repo-id', REPO, '--license', 'mit', '--data-dir', 'gone'], r'gone'),
])
def test_mistakes_are_one_line(client, hub, runs, capsys, flags, message):
    flags = [str(runs('plain')) if word == 'RUN' else word for word in flags]
    capsys.readouterr()
    assert main(['publish', *flags]) == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and re.search(message, err), err
    assert hub.repos == {}


def test_the_data_name_the_classes(client, hub, folders, tmp_path, capsys):
    data = tmp_path / 'data'
    shutil.copytree(folders / 'stripes', data)
    run = train('moved', tmp_path, [*PLAIN, '--data-dir', str(data)])
    data.rename(tmp_path / 'elsewhere')
    with pytest.raises(UserError, match='data'):
        publish(run)
    publish(run, data_dir=str(tmp_path / 'elsewhere'))
    assert json.loads(hub.files(REPO)['config.json'])['label_names'] == ['class0', 'class1', 'class2']
