"""Loading a model with what made it, from the Hub or from a folder, without trusting either.

    model = timm_amf.load('me/birds')                  # or 'me/birds@v1', or a folder
    print(model.provenance)

A repository is somebody else's. Read from it are files of known names and bounded size that carry data alone: JSON,
YAML, safetensors. `config.json` is held against a whitelist; then the model is built on the meta device, where nothing
is allocated, and its tensors are compared with those of the weights. Only then is it built.
"""
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

import timm
import torch
import yaml
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils.sha import sha_fileobj
from safetensors import safe_open
from timm.models import PretrainedCfg
from torch import nn

from timm_amf.engine.opened import RunOptions, open_trained
from timm_amf.engine.recipes import check_repo_id
from timm_amf.engine.run_folder import is_run
from timm_amf.errors import UserError, user_errors
from timm_amf.models.method import Method
from timm_amf.tuning import Plan
from timm_amf.version import __version__
from timm_amf.yaml_text import parse_yaml

__all__ = ['WEIGHTS', 'Provenance', 'connection', 'load', 'portable_args']

_logger = logging.getLogger(__name__)

WEIGHTS = 'model.safetensors'
# Endings of files that torch reads by running what is in them.
_PICKLES = ('.bin', '.pt', '.pth', '.pth.tar', '.ckpt', '.pkl', '.pickle', '.npz', '.npy')
# Bytes of a file: the names and descriptions of ImageNet-21k's classes are some 2 million; a Plan is short.
_MAX_CONFIG, _MAX_PLAN, _MAX_ARGS = 16_000_000, 200_000, 20_000
_MAX_NUMBER, _MAX_LENGTH, _MAX_DEPTH, _MAX_CLASSES = 65_536, 256, 5, 1_000_000
_KEY = re.compile(r'(?!__)[A-Za-z_]\w{0,63}')
# Names of architectures, layers, activations, poolings. No slash: neither a path nor an address of the Hub.
_WORD = re.compile(r'(?!.*\.\.)[\w.,:+\- ]{0,128}')
_TEXT = re.compile(r'(?s).{0,2000}')
# Arguments that say where to load from, or how far to trust what is loaded; none describes a network.
_REFUSED = {
    'cache_dir', 'checkpoint_path', 'custom_load', 'device', 'dtype', 'feature_cfg', 'feature_cls', 'features_only',
    'file', 'filter_fn', 'hf_hub_filename', 'hf_hub_id', 'kwargs_filter', 'model_cfg', 'out_indices', 'source',
    'state_dict', 'url',
}
# Of a network that is a part of another: the statistics that its input has.
_OF_PARTS = ('pretrained_cfg', 'pretrained_cfg_overlay')
_FREE_TEXT = ('label_names', 'label_descriptions', 'description', 'notes', 'origin_url', 'paper_name', 'paper_ids')
# The section `timm_amf` that `publish` writes: what each entry may be, for `_is`.
_OWN = {
    'data': ([dict(name=str, dataset=str, classes=int, train=int, val=int)],),
    'blocks': (None, 'tuned', 'frozen', [int, str]),
    'epoch': (None, int),
    'version': (None, str),
}


@dataclass(frozen=True)
class Provenance:
    """Which Plan and data made the weights of a model that `load` returned (`model.provenance`).

    Attributes:
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
        at = f'{self.source}@{self.commit[:10]}' if self.commit else self.source
        data = [
            f'data {c["name"]}: {c["classes"]} classes, {c["train"]} training and {c["val"]} validation images'
            for c in self.data]
        plan = 'plan: not recorded'
        if self.plan is not None:
            roles = ', '.join(f'{name} {role.lr:g}' for name, role in self.plan.roles.items() if role.lr)
            plan = f'plan: {self.plan.opt}, {self.plan.epochs} epochs, LR {self.plan.lr:g}' + (roles and f' ({roles})')
        return '\n  '.join([f'{at}: {self.architecture}', *(data or ['data: not recorded']), plan])


def load(path_or_id: Union[str, Path], revision: Optional[str] = None, **kwargs: Any) -> nn.Module:
    """Load a published model, in evaluation mode.

    A SpotTune whose results are of fixed blocks has them fixed. The architecture must be registered with timm: import
    the module of a method of your own first.

    Args:
        path_or_id: The folder of a run, or one that holds `config.json` and `model.safetensors`, or OWNER/NAME on the
            Hub, with or without @REVISION; `hf-hub:` and `local-dir:` in front are as in timm.
        revision: Branch, tag or commit of the repository; None is its main branch.
        **kwargs: To `timm.create_model`, such as `num_classes`, `in_chans`, `features_only`.

    Returns:
        The model, with a `Provenance` in its `provenance`.
    """
    cache_dir, commit, name = kwargs.pop('cache_dir', None), None, str(path_or_id)
    folder = Path(name.removeprefix('local-dir:')).expanduser()
    if is_run(folder) and not (folder / 'config.json').exists() and not kwargs and not revision:
        run = open_trained(folder, RunOptions(), needs_data=False)
        model = run.load(None)
        model.provenance = Provenance(str(folder), None, run.args.model.partition('.')[0], run.plan)
        return model
    if isinstance(path_or_id, Path) or name.startswith(('local-dir:', '.', '/', '~')) or folder.is_dir():
        if revision:
            raise UserError(f'{folder}: is a folder, and has no revision {revision!r}; leave it out')
        if not folder.is_dir():
            raise UserError(f'{folder}: no such folder; give one, or OWNER/NAME of a repository on the Hub')
        where, names = str(folder), [path.name for path in folder.iterdir()]
    else:
        where, _, own = name.removeprefix('hf-hub:').removeprefix('hf_hub:').partition('@')
        try:
            check_repo_id(where)
            with connection(where):
                folder, names = _download(where, revision or own or None, cache_dir)
        except UserError as e:
            raise UserError(f'{name}: {"no such folder here, and on the Hub: " * name.startswith(where)}{e}') from e
        commit = folder.name
    _check_names(where, names)
    config = _read_config(folder / 'config.json', where)
    own = config.get('timm_amf', {})
    plan = _read_plan(folder / 'plan.yaml', where)
    _check_fits(config, folder / WEIGHTS, where)
    model = timm.create_model(f'local-dir:{folder}', pretrained=True, **kwargs).eval()
    for module in model.modules():  # with features_only the model is within another
        if isinstance(module, Method) and 'eval_blocks' in module.takes and own.get('blocks') is not None:
            module.set_blocks(own['blocks'])
    model.provenance = Provenance(
        where, commit, config['architecture'], plan, own.get('data', []), own.get('epoch'), own.get('version'))
    _logger.info(str(model.provenance))
    return model


# -- where it is ------------------------------------------------------------------------------------------------------


@contextmanager
def connection(repo_id: str) -> Iterator[None]:
    """Around requests: an exception of a connection that broke names neither the repository nor what to do."""
    with user_errors():
        try:
            yield
        except (HfHubHTTPError, OfflineModeIsEnabled):
            raise  # they say it
        except (HTTPError, ConnectionError, RuntimeError) as e:  # the client raises its HTTP library's, or wraps them
            raise UserError(
                f'{repo_id}: the connection to the Hub broke off ({_short(e.__cause__ or e)}); nothing was changed, '
                'check the network and try again') from e


def _check_names(where: str, names: Sequence[str]) -> None:
    """Refuse files that are no model which can be loaded."""
    if 'config.json' not in names:
        remedy = f'timm-amf publish {where} --dry-run DIR writes a folder that can be loaded' if 'args.yaml' in names \
            else 'give a folder or repository that timm-amf publish or timm has written'
        raise UserError(f'{where}: has no config.json; {remedy}')
    pickles = sorted(name for name in names if name.endswith(_PICKLES))
    if WEIGHTS not in names and pickles:
        raise UserError(
            f'{where}: has its weights as a pickle alone ({ascii(pickles[0])}), which runs code when it is read; ask '
            f'its owner for {WEIGHTS}')
    if WEIGHTS not in names:
        raise UserError(f'{where}: has no {WEIGHTS}; it is no model that can be loaded')


def _download(repo: str, revision: Optional[str], cache_dir: Optional[str]) -> tuple[Path, list[str]]:
    """Fetch the files of one commit into the client's cache; give their folder, named by the commit, and the names
    of all files where one is missing.
    """
    folder = Path(snapshot_download(
        repo, revision=revision, cache_dir=cache_dir, allow_patterns=['config.json', 'plan.yaml', WEIGHTS],
        library_name='timm_amf', library_version=__version__))
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if not {'config.json', WEIGHTS} <= set(names):
        return folder, HfApi().list_repo_files(repo, revision=folder.name)
    _check_digest(folder / WEIGHTS, repo)
    return folder, names


def _check_digest(path: Path, where: str) -> None:
    """Compare a file of the client's cache with the SHA-256 that the Hub gave for it.

    The client compares no more than the length of what came. In its cache the file of a commit is a link to `blobs/`,
    where a large file has that hash for its name (and may be a link in turn, to a store by Xet's own hash). A file that
    is not what its name says is removed, so that the next try downloads it again.
    """
    blob = path.parent / path.readlink() if path.is_symlink() else path
    if not re.fullmatch(r'[0-9a-f]{64}', blob.name):
        return  # a small file, which the Hub names by git's hash of it, or a cache without links
    with path.open('rb') as file:
        digest = sha_fileobj(file).hex()
    if digest != blob.name:
        for link in (path.resolve(), blob, path):
            link.unlink(missing_ok=True)
        raise UserError(f'{where}: {path.name} is not what the Hub says it is (SHA-256 differs); try again')


# -- what is in it ----------------------------------------------------------------------------------------------------


@contextmanager
def _reading(path: Path, where: str) -> Iterator[None]:
    """Whatever is wrong with a file of somebody else's, in one line that names it and is safe to print."""
    try:
        yield
    except Exception as e:  # also what an architecture does with arguments that it was not made for
        raise UserError(f'{where}: {path.name}: {_short(e)}; it is not loaded') from e


def _short(error: BaseException) -> str:
    """The text of an exception that may quote a repository: on one line, escaped, and cut."""
    kind = '' if isinstance(error, (UserError, ValueError)) else f'{type(error).__name__}: '
    return ascii(kind + ' '.join(str(error).split()))[1:-1][:240]


def _read_text(path: Path, limit: int) -> str:
    if path.stat().st_size > limit:
        raise ValueError(f'is {path.stat().st_size} bytes long; such a file has at most {limit}')
    return path.read_text(encoding='utf-8')


def _read_config(path: Path, where: str) -> dict[str, Any]:
    """Hold a `config.json` against what timm and this package read from one."""
    with _reading(path, where):
        config = json.loads(_read_text(path, _MAX_CONFIG), parse_constant=float)
        name, cfg, args = config['architecture'], config['pretrained_cfg'], config.setdefault('model_args', {})
        if not _WORD.fullmatch(name) or not timm.is_model(name):
            raise ValueError(
                f'architecture {name:.80} is unknown here; a newer timm or timm_amf may have it, or a module that is '
                'to be imported first')
        if not isinstance(args, dict) or len(json.dumps(args)) > _MAX_ARGS:
            raise ValueError('model_args are not the arguments of a network')
        _check_value(args, 'model_args', _WORD)
        for key, value in cfg.items():
            if key not in PretrainedCfg.__dataclass_fields__ or (key in _REFUSED and value):
                raise ValueError(f'pretrained_cfg.{key:.80} is not read from a repository; a newer timm may know it')
            if key not in (*_REFUSED, *_FREE_TEXT, 'num_classes'):
                _check_value(value, f'pretrained_cfg.{key}', _TEXT)
        for section in (config, cfg):
            _check_count(section.get('num_classes'))
            for key in ('label_names', 'label_descriptions'):
                names = section.get(key) or []
                names = list(names.values()) if isinstance(names, dict) else names
                if not (_is(names, [str]) and all(map(_TEXT.fullmatch, names)) and len(names) <= _MAX_CLASSES):
                    raise ValueError(f'{key} must be short texts')
        own = config.get('timm_amf', {})
        if not (_is(own, dict) and all(_is(own[key], *kinds) for key, kinds in _OWN.items() if key in own)
                and all(part['name'].isprintable() for part in own.get('data', []))):
            raise ValueError('the section timm_amf is damaged')
    return config


def _is(value: Any, *kinds: Any) -> bool:
    """Whether a value is of a type, or a list or a mapping of such values, or one of these values."""
    return any(
        type(value) is kind if isinstance(kind, type)
        else type(value) is list and all(_is(item, *kind) for item in value) if isinstance(kind, list)
        else type(value) is dict and all(_is(value.get(key), k) for key, k in kind.items()) if isinstance(kind, dict)
        else value == kind for kind in kinds)


def portable_args(args: Any, depth: int = 0) -> Any:
    """Arguments of a model without those that are not read from a repository: its weights are in the file now."""
    if isinstance(args, Mapping):
        return {k: portable_args(v, depth + 1) for k, v in args.items() if not _is_refused(k, depth)}
    return [portable_args(v, depth + 1) for v in args] if isinstance(args, (list, tuple)) else args


def _is_refused(key: str, depth: int) -> bool:
    return key in _REFUSED or (key.startswith('pretrained') and not (key in _OF_PARTS and depth))


def _check_value(value: Any, what: str, text: re.Pattern, depth: int = 0) -> None:
    """Numbers and words of a bounded size, and lists and mappings of them."""
    if isinstance(value, (dict, list)):
        if depth > _MAX_DEPTH or len(value) > _MAX_LENGTH:
            raise ValueError(f'{what:.80} is nested too deeply, or has more than {_MAX_LENGTH} entries')
        for key, item in value.items() if isinstance(value, dict) else ((None, item) for item in value):
            if key is not None and (_is_refused(key, depth) or not _KEY.fullmatch(key)):
                raise ValueError(f'{what:.80}.{key:.80} is not read from a repository')
            if key == 'num_classes':
                _check_count(item)
            else:
                _check_value(item, what if key is None else f'{what}.{key}', text, depth + 1)
    elif isinstance(value, str):
        if not text.fullmatch(value):
            raise ValueError(f'{what:.80}: {value:.80} is no name of a layer or architecture')
    elif value is not None and not abs(value) <= _MAX_NUMBER:  # NaN fails too
        raise ValueError(f'{what:.80} is beyond {_MAX_NUMBER}')


def _check_count(value: Any) -> None:
    if value is not None and (type(value) is not int or not 0 <= value <= _MAX_CLASSES):
        raise ValueError(f'num_classes must be a number up to {_MAX_CLASSES}')


def _read_plan(path: Path, where: str) -> Optional[Plan]:
    """The Plan; YAML may have neither tags, which make objects, nor aliases, which make a short text very long."""
    if not path.is_file():
        return None
    with _reading(path, where):
        text = _read_text(path, _MAX_PLAN)
        content = parse_yaml(text, 'the Plan')  # first: it stops where text is nested too deeply to be read in time
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise ValueError('has aliases')
        return Plan.from_dict(content['plan'])


def _check_fits(config: dict[str, Any], weights: Path, where: str) -> None:
    """Compare the tensors that a checked `config.json` asks for with those of the weights, before any is allocated."""
    name, cfg = config['architecture'], config['pretrained_cfg']
    args = {'num_classes': config.get('num_classes', cfg.get('num_classes', 1000)), **config['model_args']}
    with _reading(weights.with_name('config.json'), where):
        with torch.random.fork_rng(devices=[]), torch.device('meta'):
            model = timm.create_model(name, pretrained_cfg={**cfg, 'architecture': name}, **args)
    with _reading(weights, where), safe_open(weights, framework='pt') as file:  # checks the length of the file
        has = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        needs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        unlike = sorted(n for n in needs.keys() | has.keys() if needs.get(n) != has.get(n))
        if unlike:
            n = unlike[0]
            raise ValueError(
                f'are not the weights of its config.json: {len(unlike)} tensors differ, {n:.80} first '
                f'({has.get(n, "none")} in the file, {needs.get(n, "none")} in the model)')
