"""Publishing a run on the Hub.

    timm-amf publish runs/amf --repo-id me/birds --license apache-2.0 --dry-run staged     (look at it first)
    timm-amf publish runs/amf --repo-id me/birds --license apache-2.0 --private

A folder (docs/hub.md has its files) is written, loaded back and compared with the run's model, then sent in one commit.
The token is that of the Hub's own client (`hf auth login`, or HF_TOKEN); it is neither printed nor written.
"""
import argparse
import contextlib
import json
import math
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Optional, Union

import torch
import yaml
from huggingface_hub import HfApi, get_token
from timm.models import get_arch_name, get_model_args, save_for_hf
from torch import nn

from timm_amf.data import data_spec_from_args, splits_from_args
from timm_amf.engine.checkpoint import Checkpointer, read_state
from timm_amf.engine.intervals import wilson_interval
from timm_amf.engine.opened import Opened, RunOptions, open_trained
from timm_amf.engine.recipes import check_repo_id
from timm_amf.engine.run_folder import best_row, mixed_row, shown_as
from timm_amf.errors import UserError
from timm_amf.files import whole_folder
from timm_amf.hub.card import build_card
from timm_amf.hub.load import WEIGHTS, connection, load, portable_args
from timm_amf.models.method import method_of
from timm_amf.text import read_rows
from timm_amf.version import __version__

__all__ = ['Publication', 'Result', 'check_flags', 'main', 'publish', 'publish_finished']

# Files that an earlier publishing may have left.
_FILES = (WEIGHTS, 'config.json', 'plan.yaml', 'args.yaml', 'summary.csv', 'policy.csv', 'metrics.json', 'README.md')
_FIGURES = ('.png', '.svg', '.jpg')
# Options that are of the machine or the occasion, not of what was trained.
_PRIVATE = (
    'output', 'experiment', 'resume', 'overwrite', 'cache_dir', 'tracker', 'log_wandb', 'wandb_project', 'wandb_tags',
    'wandb_resume_id', 'no_progress', 'publish', 'publish_license', 'publish_private', 'publish_revision',
    'publish_message',
)
# A folder of this machine, at the start of a value or behind the '=' or ',' of a component.
_FOLDER = re.compile(
    r'(?P<before>^|[=,;\s]|\bhfds/)(?:~|\.{1,2}|[A-Za-z]:)?[/\\](?:[^,;=\s]*[/\\])?(?P<name>[^,;=\s/\\]*)[/\\]?')
_WHOLE_FOLDER = re.compile(r'(?:~[^/\\]*|\.{1,2}|[A-Za-z]:)?[/\\]')
_TOKEN = re.compile(r'\bhf_[A-Za-z0-9]{20,}')


@dataclass(frozen=True)
class Result:
    """Accuracy, in percent, of a component of the data ('' for all images), with the limits of its 95 % interval.

    `how` is how it was evaluated; `runs` is `mean of N runs` or `ensemble of N runs`, '' for the published run.
    """
    data: str
    split: str
    images: int
    top1: float
    low: float
    high: float
    top5: Optional[float]
    how: str
    runs: str = ''


def _shows_images(figure: Path) -> bool:
    """A sheet of the user's images, whose table beside it has their texts."""
    table = figure.with_suffix('.csv')
    return table.is_file() and table.read_text(encoding='utf-8').startswith('group,image,text')


@dataclass
class Publication:
    """A run as it is published.

    Attributes:
        run: The run.
        trained: Its model.
        model: The model that is published: that, or what its fixed path leaves.
        results: What it came to.
        best: Row of `summary.csv` of the best epoch, of a mix with what it reached; empty where no epoch was evaluated.
    """
    run: Opened
    trained: nn.Module
    model: nn.Module
    results: list[Result]
    best: Mapping[str, str]

    @property
    def epoch(self) -> Optional[int]:
        """Of the best weights, from 0."""
        return int(self.best['epoch']) if self.best else None

    @property
    def spec(self):
        return data_spec_from_args(self.run.args)

    @cached_property
    def data_config(self) -> dict[str, Any]:
        return shown_as(self.run.args, self.trained)

    @property
    def components(self) -> list[dict[str, Any]]:
        """Name, dataset, and numbers of classes and images of each component of the data."""
        train, val = self.run.data
        return [
            dict(
                name=component.name,
                dataset=_without_folders(component.dataset),
                # Of several components with the same labels each has all of them.
                classes=len(set(train.targets[train.component_of == i].tolist())),
                train=int((train.component_of == i).sum()),
                val=int((val.component_of == i).sum()),
            )
            for i, component in enumerate(self.spec.components)]

    @property
    def blocks(self) -> Optional[list[int]]:
        """The path of all images that the results are of; None where images choose, or there are no paths."""
        return method_of(self.model).fixed_path(self.run.plan.global_k, self.run.args.eval_blocks)

    @property
    def figures(self) -> list[tuple[Path, str]]:
        """The charts of the run's report, with the name that each has in the repository; no sheets of images."""
        report = self.run.folder / 'report'
        found = sorted(p for p in report.rglob('*') if p.suffix in _FIGURES and not _shows_images(p))
        return [(path, 'figures/' + '-'.join(path.relative_to(report).parts)) for path in found]


def publish(
        run: Union[str, Path],
        repo_id: str,
        license: str,
        *,
        private: bool = False,
        revision: Optional[str] = None,
        message: Optional[str] = None,
        keep_card: bool = False,
        data_dir: Optional[str] = None,
        compact: bool = False,
        results: Union[str, Path, None] = None,
        dry_run: Union[str, Path, None] = None,
        license_name: Optional[str] = None,
        license_link: Optional[str] = None,
        base_models: Optional[Sequence[str]] = None,
        datasets: Optional[Sequence[str]] = None,
) -> Optional[str]:
    """Publish a run.

    Args:
        run: Folder of the run; its data must be where they were, or at `data_dir`: they name the classes.
        repo_id: OWNER/NAME; made if it is not there.
        license: Licence of the weights, as the Hub names it (`apache-2.0`, `cc-by-nc-4.0`, `other`, ...).
        private: Visible to the owner alone.
        revision: Branch, made if it is not there; None is the main one.
        message: Message of the commit; None says what was published.
        keep_card: Leave the README that the repository has as it is.
        data_dir: Folder of the data, where it is not that of the run.
        compact: Of a SpotTune trained with a global k, publish the plain model that is left.
        results: A file of `timm-amf evaluate --results-file` for the card.
        dry_run: An empty folder to write what would be published to; nothing is sent.
        license_name: Name of a licence that is `other`.
        license_link: Where it is.
        base_models: Hub ids of the models that the run started from; None finds them in the run.
        datasets: Hub ids or names of the data; None takes the names of the components.

    Returns:
        Address of the commit; None of a dry run.

    Raises:
        UserError: If the run cannot be published. Errors of the Hub are those of its client, and then the repository
            is as it was.
    """
    _check_target(repo_id, license, login=dry_run is None)
    if license == 'other' and not (license_name and license_link):
        raise UserError('--license other: say which with --license-name and --license-link')
    target = None if dry_run is None else Path(dry_run)
    if target is not None and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f'--dry-run {target}: is not empty; name a new folder')
    opened = prepare(run, data_dir, compact, results)
    card = build_card(opened, repo_id, license, license_name, license_link, base_models, datasets)
    # A dry run is there whole or not at all.
    staging = tempfile.TemporaryDirectory() if target is None else whole_folder(target, 'name another --dry-run')
    with staging as temporary:
        folder = Path(temporary)
        _stage(opened, folder, card, license)
        for path in sorted(filter(Path.is_file, folder.rglob('*'))):
            print(f'{path.stat().st_size:>12,}  {path.relative_to(folder).as_posix()}')
        if target is None:
            with connection(repo_id):
                address = _upload(folder, repo_id, private, revision, message, keep_card)
            print(f'published: {address}')
            return address
        with contextlib.suppress(FileNotFoundError):
            target.rmdir()  # Windows renames nothing to a folder that is there
    print(f'nothing was sent; see {target}')
    return None


def _check_target(repo_id: str, license: str, login: bool = True) -> None:
    """What can be checked before a run of days or a big file."""
    check_repo_id(repo_id)
    if not re.fullmatch(r'[a-z0-9][a-z0-9.+-]*', license or ''):
        raise UserError(
            f"--license: {license or 'is missing'}; name the licence of the weights as the Hub does, such as "
            'apache-2.0, mit, cc-by-4.0, or other')
    if login and not get_token():
        raise UserError(f'{repo_id}: you are not logged in to the Hub; run `hf auth login`')


def _upload(
        folder: Path,
        repo_id: str,
        private: bool,
        revision: Optional[str],
        message: Optional[str],
        keep_card: bool,
) -> str:
    """Send all files in one commit, which also removes what an earlier one left that is no more."""
    api = HfApi(library_name='timm_amf', library_version=__version__)
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    if private and not api.model_info(repo_id).private:
        raise UserError(f'{repo_id}: is there already and public; make it private in its settings, or leave --private')
    if revision:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    keep_card = keep_card and api.file_exists(repo_id, 'README.md', revision=revision)
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        commit_message=message or f'timm_amf {__version__}: weights and card',
        ignore_patterns=['README.md'] if keep_card else None,
        delete_patterns=[
            *(name for name in _FILES if not (keep_card and name == 'README.md')),
            *(f'figures/*{ending}' for ending in _FIGURES)],
    ).commit_url


# -- what it is -------------------------------------------------------------------------------------------------------


def prepare(
        run: Union[str, Path],
        data_dir: Optional[str] = None,
        compact: bool = False,
        results: Union[str, Path, None] = None,
) -> Publication:
    """Open a run to publish it; the arguments are those of `publish`."""
    opened = open_trained(run, RunOptions(data_dir=data_dir))
    checkpoint = Checkpointer(opened.folder).found()
    images = checkpoint and read_state(checkpoint)['identity'].get('samples')
    if images not in (None, len(opened.data[0])):
        raise UserError(
            f'{run}: was trained on {images} images, and its data have {len(opened.data[0])} by now, so that its card '
            f'would be false; name the same data with --data-dir')
    model = trained = opened.load(opened.data[0].num_classes)
    if compact:
        path = method_of(model).fixed_path(opened.plan.global_k)
        if path is None or opened.plan.global_k is None:
            raise UserError(f'{run}: --compact needs a SpotTune that was trained with --global-k; leave it out')
        model = model.compact(path).eval()
    best, own = _own_results(opened)
    evaluated = [] if results is None else _evaluated(Path(results), opened.folder.resolve().name)
    return Publication(opened, trained, model, [*evaluated, *own], best)


def _own_results(run: Opened) -> tuple[Mapping[str, str], list[Result]]:
    """The best epoch of `summary.csv`, by the metric of the run, or what was mixed with it, and the accuracies."""
    path = run.folder / 'summary.csv'
    every = read_rows(path) if path.exists() else []
    best = best_row(every, run.args.eval_metric)
    if not best:
        return {}, []
    how = f'one crop, after epoch {int(best["epoch"]) + 1} of {len(every)}, the best on it'
    if mixed := mixed_row(run.folder, run.args.eval_metric):
        share = float(mixed['share'])
        how = f'{how}, {share:g} of the way there from the start' if share else (
            f'one crop, the weights of the start, above all {len(every)} epochs on it')
        best = {**best, **{name: value for name, value in mixed.items() if name.startswith('eval_')}}
    val, split = run.data[1], splits_from_args(run.args)[1]
    results = []
    for i, name in enumerate(['', *(val.components if len(val.components) > 1 else [])]):
        images = int((val.component_of == i - 1).sum()) if name else len(val)
        top1 = float(best.get(f'eval_top1_{name}' if name else 'eval_top1') or math.nan)
        if images and not math.isnan(top1):
            low, high = wilson_interval(top1 / 100 * images, images)
            top5 = float(best['eval_top5']) if not name else None
            results.append(Result(name, split, images, top1, 100 * low, 100 * high, top5, how))
    return best, results


def _evaluated(path: Path, run: str) -> list[Result]:
    """The rows of a file of `timm-amf evaluate --results-file` that are of a run, and those of all runs together."""
    results = []
    try:
        for row in read_rows(path):
            together = row['run'] if row['run'].startswith(('mean of ', 'ensemble of ')) else ''
            if together or Path(row['run']).name == run:
                how = 'ten crops' if row['crops'] == '10' else 'one crop'
                values = [float(row[key]) for key in ('top1', 'top1_low', 'top1_high', 'top5')]
                results.append(Result(
                    row['component'], row['split'] or 'val', int(row['images']), *values, how, together))
    except FileNotFoundError:
        raise UserError(
            f'--results {path}: no such file; timm-amf evaluate RUN --results-file FILE writes one') from None
    except (KeyError, ValueError, TypeError, AttributeError) as e:
        raise UserError(
            f'--results {path}: is not of timm-amf evaluate --results-file ({type(e).__name__}: {e})') from None
    if not results:
        raise UserError(f'--results {path}: has no row of {run}; evaluate the run that is published')
    return results


# -- the files --------------------------------------------------------------------------------------------------------


def _stage(what: Publication, folder: Path, card: str, license: str) -> None:
    """Write what is published into an empty folder, and check it."""
    run = what.run
    save_for_hf(what.model, str(folder), safe_serialization=True, **_config(what, license))
    _dump(folder / 'plan.yaml', {'plan': run.plan.to_dict()})
    _dump(folder / 'args.yaml', _public_args(run))
    metrics = dict(
        epoch=what.epoch,
        eval_metric=run.args.eval_metric,
        summary={k: float(v) for k, v in what.best.items() if v and k != 'epoch'},
        confidence=0.95,
        results=[vars(result) for result in what.results],
    )
    (folder / 'metrics.json').write_text(json.dumps(metrics, indent=2) + '\n', encoding='utf-8')
    tables = [(run.folder / name, name) for name in ('summary.csv', 'policy.csv') if (run.folder / name).exists()]
    for source, name in (*tables, *what.figures):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source, folder / name)
    (folder / 'README.md').write_text(card, encoding='utf-8')
    _check_secrets(folder)
    _check_loads(what, folder)


def _config(what: Publication, license: str) -> dict[str, Any]:
    """What `save_for_hf` writes of the model into `config.json`."""
    run, model = what.run, what.model
    args = get_model_args(model)
    if model is not what.trained:
        args = {**args, **what.trained.compact_args()}
    # A head with more outputs than the data have classes has names for the first ones alone.
    names = {'label_names': run.names} if model.num_classes == len(run.names) else {}
    own = dict(
        version=__version__,
        trained=get_arch_name(what.trained.pretrained_cfg['architecture']),
        data=what.components,
        splits=list(splits_from_args(run.args)),
        epoch=what.epoch,
        **({} if what.blocks is None else {'blocks': what.blocks}),
    )
    return dict(
        # Tag and licence are not those of the weights that it started from.
        model_config={**names, 'pretrained_cfg': {'tag': None, 'license': license}, 'timm_amf': own},
        model_args=portable_args(args),
        data_config=what.data_config,
    )


def _dump(path: Path, content: Mapping) -> None:
    """Write YAML; equal values are written out, for aliases are not read from a repository."""
    text = yaml.safe_dump(json.loads(json.dumps(content)), sort_keys=False, allow_unicode=True)
    path.write_text(text, encoding='utf-8')


def _public_args(run: Opened) -> dict[str, Any]:
    """The options of the run without folders, secrets and what is of the occasion; `--config` takes them."""
    content = {k: _without_folders(v) for k, v in run.options.items() if k not in _PRIVATE}
    content['plan'] = run.plan.to_dict()  # also where the run had it from a file
    if 'explicit' in content:
        content['explicit'] = [name for name in content['explicit'] if name not in (*_PRIVATE, 'plan')]
    return content


def _without_folders(value: Any) -> Any:
    """Paths of this machine shortened to their last part, and what looks like a token taken out."""
    if isinstance(value, Mapping):
        return {k: _without_folders(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_folders(v) for v in value]
    if not isinstance(value, str):
        return value
    if _WHOLE_FOLDER.match(value):  # also with spaces and commas in it
        value = re.split(r'[/\\]', value.rstrip('/\\'))[-1]
    return _TOKEN.sub('***', _FOLDER.sub(lambda m: m['before'] + m['name'], value))


def _check_secrets(folder: Path) -> None:
    """Refuse files in which a token of the Hub is; the last check, after what is known was taken out."""
    token = get_token()
    for path in folder.rglob('*'):
        if path.suffix in ('.md', '.json', '.yaml', '.csv', '.svg'):
            text = path.read_text(encoding='utf-8')
            if (token and token in text) or _TOKEN.search(text):
                raise UserError(f'{path.name}: holds an access token of the Hub; take it out of the run and revoke it')


@torch.no_grad()
def _check_loads(what: Publication, folder: Path) -> None:
    """Load the folder as others will, and compare what both models compute."""
    back = load(folder)
    images = torch.randn(2, *what.data_config['input_size'], generator=torch.Generator().manual_seed(0))
    with method_of(what.model).evaluation(what.run.plan.global_k, what.run.args.eval_blocks):
        ours, theirs = what.model(images), back(images)
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5, equal_nan=True):
        raise UserError(
            f'{what.run.folder}: the model does not come back from its config.json (logits differ); an option that no '
            f'argument of the model expresses, such as --bn-eps or --split-bn, cannot be published')


# -- the train script and the verb ------------------------------------------------------------------------------------


def check_flags(args: argparse.Namespace) -> None:
    """Check `--publish` and what belongs to it before a run of days, not after."""
    if not args.publish_license:
        raise UserError('--publish: name the licence of the weights with --publish-license, such as apache-2.0')
    _check_target(args.publish, args.publish_license)


def publish_finished(args: argparse.Namespace, folder: Path) -> None:
    """What `train_amf.py --publish` does when the run is complete."""
    try:
        publish(
            folder, args.publish, args.publish_license, private=args.publish_private,
            revision=args.publish_revision, message=args.publish_message)
    except Exception as e:  # whatever it is, the run is whole
        raise UserError(
            f'{" ".join(str(e).split())} | the run itself is complete; publish it with: timm-amf publish {folder} '
            f'--repo-id {args.publish} --license {args.publish_license}') from e


def main(args: argparse.Namespace) -> None:
    """`timm-amf publish`: publish a run, or with --dry-run write what would be published."""
    publish(**vars(args))
