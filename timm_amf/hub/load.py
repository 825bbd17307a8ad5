"""Loading a model with what made it, from the Hub or from a folder, without trusting either.

    model = timm_amf.load('me/birds')                  # or 'me/birds@v1', or a folder
    print(model.provenance)

`timm.create_model('hf-hub:me/birds', pretrained=True)` reads the same files, with timm's own checks alone.
"""
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

import timm
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch import nn

from timm_amf.errors import UserError
from timm_amf.hub.client import check_repo_id, hub_errors
from timm_amf.hub.safety import PICKLES, WEIGHTS, check_digest, check_fits, read_config, read_yaml
from timm_amf.models.method import Method
from timm_amf.models.sources import loading
from timm_amf.tuning import Plan
from timm_amf.version import __version__

__all__ = ['Provenance', 'load']

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Provenance:
    """Which Plan and data made the weights of a model that `load` returned (`model.provenance`).

    Args:
        source: The repository or folder.
        commit: Commit of the repository; None of a folder.
        architecture: What was built.
        plan: How it was fine-tuned; None where the repository has no Plan.
        data: For each component of the data `name`, `dataset`, `classes`, and `train` and `val`, numbers of images.
        epoch: Epoch of the weights, from 0; None where it is not known.
        version: timm_amf that published it; None where another program did.
    """
    source: str
    commit: Optional[str]
    architecture: str
    plan: Optional[Plan] = None
    data: list[dict[str, Any]] = field(default_factory=list)
    epoch: Optional[int] = None
    version: Optional[str] = None

    def __str__(self) -> str:
        where = self.source if self.commit is None else f'{self.source}@{self.commit[:10]}'
        lines = [f'{where}: {self.architecture}']
        for c in self.data:
            lines.append(
                f'  data {c["name"]}: {c["classes"]} classes, {c["train"]} training and {c["val"]} validation images')
        if not self.data:
            lines.append('  data: not recorded')
        if self.plan is None:
            lines.append('  plan: not recorded')
        else:
            plan = self.plan
            roles = ', '.join(
                f'{name} {role.lr:g}' for name, role in plan.roles.items() if role.lr is not None and role.lr > 0)
            lines.append(f'  plan: {plan.opt}, {plan.epochs} epochs, LR {plan.lr:g}{f" ({roles})" if roles else ""}')
        return '\n'.join(lines)


def load(path_or_id: Union[str, Path], revision: Optional[str] = None, **kwargs) -> nn.Module:
    """Load a published model, in evaluation mode.

    Everything that is read is checked first (`timm_amf.hub.safety`): no pickle is loaded, no argument builds what the
    weights do not fill, a file is what the Hub says it is. A SpotTune whose results are of fixed blocks has them fixed.

    Args:
        path_or_id: A folder that holds `config.json` and `model.safetensors`, or OWNER/NAME on the Hub, with or without
            @REVISION; `hf-hub:` and `local-dir:` in front are as in timm.
        revision: Branch, tag or commit of the repository; None is its main branch.
        **kwargs: To `timm.create_model`, such as `num_classes`, `in_chans`, `features_only`.

    Returns:
        The model, with a `Provenance` in its `provenance`.

    Raises:
        UserError: If there is no such repository or folder, it cannot be had, or it is not what it should be.
    """
    cache_dir = kwargs.pop('cache_dir', None)
    folder = _as_folder(path_or_id)
    if folder is not None:
        if revision:
            raise UserError(f'{folder}: is a folder, and has no revision {revision!r}; leave it out')
        where, commit = str(folder), None
        _check_folder(folder)
    else:
        repo, revision = _as_repo(path_or_id, revision)
        folder, commit = _download(repo, revision, cache_dir)
        where = repo
    config = read_config(folder / 'config.json', where)
    plan = _read_plan(folder / 'plan.yaml', where)
    own = _own_section(config, where)
    check_fits(config, folder / WEIGHTS, where)
    model = _build(config, folder, where, kwargs)
    for module in model.modules():  # with features_only the model is within another
        if isinstance(module, Method) and 'eval_blocks' in module.takes and own.get('blocks') is not None:
            module.set_blocks(own['blocks'])
    model.provenance = Provenance(
        where, commit, config['architecture'], plan, own.get('data', []), own.get('epoch'), own.get('version'))
    _logger.info(str(model.provenance))
    return model


def _as_folder(path_or_id: Union[str, Path]) -> Optional[Path]:
    """The folder that is meant, None where it is a repository."""
    if isinstance(path_or_id, Path):
        return path_or_id
    source, colon, rest = path_or_id.partition(':')
    if colon and source == 'local-dir':
        return Path(rest)
    if colon and source in ('hf-hub', 'hf_hub'):
        return None
    looks_local = path_or_id.startswith(('.', '/', '~')) or path_or_id.count('/') != 1
    path = Path(path_or_id).expanduser()
    return path if path.is_dir() or looks_local else None


def _as_repo(path_or_id: str, revision: Optional[str]) -> tuple[str, Optional[str]]:
    name = path_or_id.partition(':')[2] if path_or_id.startswith(('hf-hub:', 'hf_hub:')) else path_or_id
    repo, at, own = name.partition('@')
    check_repo_id(repo)
    if at and revision and own != revision:
        raise UserError(f'{name}: two revisions, {own} and {revision}; give one')
    return repo, own or revision


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f'{folder}: no such folder; give one, or OWNER/NAME of a repository on the Hub')
    if not (folder / 'config.json').is_file():
        run = (folder / 'args.yaml').is_file()
        remedy = f'timm-amf publish {folder} --dry-run DIR writes a folder that can be loaded' if run else \
            'give a folder that timm-amf publish or timm has written'
        raise UserError(f'{folder}: has no config.json; {remedy}')
    if not (folder / WEIGHTS).is_file():
        raise _no_weights(str(folder), [p.name for p in folder.iterdir()])


def _no_weights(where: str, names: list[str]) -> UserError:
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if pickles:
        return UserError(
            f'{where}: has its weights as a pickle alone ({ascii(pickles[0])}), which runs code when it is read; ask '
            f'its owner for {WEIGHTS}')
    return UserError(f'{where}: has no {WEIGHTS}; it is no model that can be loaded')


def _download(repo: str, revision: Optional[str], cache_dir: Optional[str]) -> tuple[Path, str]:
    """Fetches the files of one commit into the client's cache; returns their folder and the commit."""

    def fetch(name: str, at: Optional[str]) -> Path:
        return Path(hf_hub_download(
            repo, name, revision=at, cache_dir=cache_dir, library_name='timm_amf', library_version=__version__))

    where = f'{repo}@{revision}' if revision else repo
    with hub_errors(where, 'read'):
        try:
            config = fetch('config.json', revision)
        except LocalEntryNotFoundError:
            raise  # the Hub could not be asked
        except EntryNotFoundError:
            raise UserError(f'{where}: has no config.json; it is no model that can be loaded') from None
        # The cache keeps each commit in a folder of its name. What a branch holds may change between two requests.
        commit = config.parent.name
        try:
            weights = fetch(WEIGHTS, commit)
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            raise _no_weights(where, HfApi().list_repo_files(repo, revision=commit)) from None
        check_digest(weights, where)
        try:
            fetch('plan.yaml', commit)
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            pass  # a model that another program published
    return config.parent, commit


def _read_plan(path: Path, where: str) -> Optional[Plan]:
    if not path.is_file():
        return None
    content = read_yaml(path, where)
    try:
        return Plan.from_dict(content['plan'])
    except (KeyError, TypeError, AttributeError):
        raise UserError(f'{where}: plan.yaml holds no Plan') from None
    except UserError as e:
        raise UserError(f'{where}: plan.yaml: {e}') from None


def _own_section(config: dict[str, Any], where: str) -> dict[str, Any]:
    """What `publish` wrote under `timm_amf`, its types checked."""
    own = config.get('timm_amf', {})
    wrong = UserError(f'{where}: the section timm_amf of config.json is damaged')
    if not isinstance(own, dict) or not isinstance(own.get('data', []), list):
        raise wrong
    kinds = {'name': str, 'dataset': str, 'classes': int, 'train': int, 'val': int}
    for component in own.get('data', []):
        if not isinstance(component, dict) or any(type(component.get(k)) is not kind for k, kind in kinds.items()):
            raise wrong
        if not component['name'].isprintable():
            raise wrong
    blocks = own.get('blocks')
    plain = blocks in (None, 'tuned', 'frozen') or (
        isinstance(blocks, list) and all(type(b) in (int, str) for b in blocks))
    if not plain or type(own.get('epoch', 0)) not in (int, type(None)) or not isinstance(own.get('version', ''), str):
        raise wrong
    return own


def _build(config: dict[str, Any], folder: Path, where: str, kwargs: dict[str, Any]) -> nn.Module:
    with loading(where, {'file': str(folder / WEIGHTS)}):
        return timm.create_model(f'local-dir:{folder}', pretrained=True, **kwargs).eval()
