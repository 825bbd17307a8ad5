"""Where pretrained weights come from, and one line for the user when they cannot be had or do not fit."""
import logging
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional, Union

from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from torch import nn

from ..errors import UserError, misfit
from .tags import unpublished

__all__ = ['as_names', 'check_source', 'has_source', 'load_network', 'loading']

_logger = logging.getLogger(__name__)

# What timm looks for in a Hub repository, in its order.
_HUB_FILES = ('model.safetensors', 'pytorch_model.bin')
# Seconds that the Hub gets to answer before a run without network fails.
_HUB_TIMEOUT = 5.0
_LOCAL_COPY = (
    "name a local copy with --pretrained-path (of a part, --backbone-weights or --policy-weights; in Python "
    "pretrained_cfg_overlay={'file': ...} in its keyword arguments)")


def as_names(names: Union[str, Sequence[str], None]) -> tuple[str, ...]:
    """An entry of a `pretrained_cfg` that is a module name, several of them, or nothing."""
    return (names,) if isinstance(names, str) else tuple(names or ())


def _describe(cfg: dict[str, Any]) -> str:
    if cfg.get('state_dict'):
        return 'the given state dict'
    if cfg.get('file'):
        return f"file {cfg['file']}"
    return f"Hub repository {cfg['hf_hub_id']}" if cfg.get('hf_hub_id') else str(cfg.get('url'))


def _unreachable(name: str, cfg: dict[str, Any], reason: BaseException) -> UserError:
    what = f"the pretrained weights of '{name}' from {_describe(cfg)} ({type(reason).__name__})"
    if cfg.get('file'):
        return UserError(f'cannot read {what}.')
    return UserError(
        f'cannot get {what}: go online once so that they are cached, {_LOCAL_COPY}, or pass pretrained=False.')


def has_source(cfg: dict[str, Any]) -> bool:
    """Whether a `pretrained_cfg` names weights at all; some architectures were never published with any."""
    return any(cfg.get(key) for key in ('state_dict', 'file', 'hf_hub_id', 'url'))


def check_source(name: str, cfg: dict[str, Any], cache_dir: Optional[Union[str, Path]] = None) -> None:
    """Check that weights can be had, before anything is built or downloaded.

    `hf_hub_download` retries for most of a minute where there is no network, and then names neither model nor file.
    """
    if not has_source(cfg):
        raise UserError(f"timm has no pretrained weights for '{name}': {_LOCAL_COPY}, or pass pretrained=False.")
    if cfg.get('state_dict'):
        return
    if cfg.get('file') and not Path(cfg['file']).exists():
        raise UserError(f"the weights file of '{name}' does not exist: {cfg['file']}")
    if cfg.get('hf_hub_id') and not cfg.get('file'):
        _check_hub(name, cfg, cache_dir)


def _check_hub(name: str, cfg: dict[str, Any], cache_dir: Optional[Union[str, Path]]) -> None:
    repo, _, revision = cfg['hf_hub_id'].partition('@')
    files = as_names(cfg.get('hf_hub_filename')) or _HUB_FILES
    if any(isinstance(try_to_load_from_cache(repo, f, cache_dir, revision or None), str) for f in files):
        return
    try:
        get_hf_file_metadata(hf_hub_url(repo, files[0], revision=revision or None), timeout=_HUB_TIMEOUT)
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError) as e:
        missing = type(e) is RepositoryNotFoundError and unpublished(cfg, f'the Hub has no public {repo}')
        raise UserError(missing or (
            f"the pretrained weights of '{name}' are not at {_describe(cfg)} ({type(e).__name__}): check the name, "
            'or log in with `hf auth login` if it is private.'
        )) from e
    except EntryNotFoundError as e:
        if cfg.get('hf_hub_filename'):
            raise UserError(f"{_describe(cfg)} has no {files[0]} for '{name}'; ask its owner for it.") from e
        # the repository answers; timm tries its other file names
    except Exception as e:  # the Hub's client raises its HTTP library's own types, which differ between versions
        missing = unpublished(cfg, f'as far as this version knows; {type(e).__name__} for {repo}')
        raise UserError(missing) if missing else _unreachable(name, cfg, e) from e


@contextmanager
def loading(name: str, cfg: dict[str, Any]) -> Iterator[None]:
    """Make one line, which names the network, of the errors of a load by timm."""
    try:
        yield
    except (UserError, TypeError):  # an unknown keyword is a TypeError in timm, here too
        raise
    except OSError as e:
        raise _unreachable(name, cfg, e) from e
    except Exception as e:  # safetensors, pickle and shape errors: all mean that this file is not the one
        reason = misfit(e) or ' '.join(str(e).split())[:200] or type(e).__name__
        if isinstance(e, (pickle.UnpicklingError, EOFError, IndexError)) or 'weights_only' in reason:
            reason = 'it is damaged, or holds more than tensors; save its state dict alone, best as safetensors'
        raise UserError(f"cannot load the weights of '{name}' from {_describe(cfg)}: {reason}") from e


@contextmanager
def _missing_keys() -> Iterator[list[str]]:
    """Collect what timm logs at INFO of parameters that a checkpoint did not have; what is shown stays as it was."""
    logger, keys = logging.getLogger('timm.models._builder'), []
    level, shown = logger.level, logger.getEffectiveLevel()

    def collect(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if message.startswith('Missing keys ('):
            keys.extend(message.partition('(')[2].partition(')')[0].split(', '))
        return record.levelno >= shown

    logger.addFilter(collect)
    logger.setLevel(min(shown, logging.INFO))
    try:
        yield keys
    finally:
        logger.setLevel(level)
        logger.removeFilter(collect)


def load_network(name: str, cfg: dict[str, Any], create) -> nn.Module:
    """Build a network with its pretrained weights, and say which parameters stay random.

    timm loads without `strict` whenever the number of classes differs, so that the weights of another architecture
    would leave the network random and no more than a line at INFO would tell. The classifier may stay random.
    """
    with loading(name, cfg), _missing_keys() as keys:
        net = create()
    parameters = {n for n, _ in net.named_parameters()}
    missing = [k for k in keys if k in parameters and k.rpartition('.')[0] not in as_names(cfg.get('classifier'))]
    filled = sum(p.numel() for n, p in net.named_parameters() if n not in keys)
    share = 100 * filled / sum(p.numel() for p in net.parameters())
    _logger.info(f"{_describe(cfg)}: {share:.1f} % of the parameters of '{name}'")
    if len(missing) > 0.5 * len(parameters):
        raise UserError(
            f"{_describe(cfg)} does not hold the weights of '{name}': {len(missing)} of its {len(parameters)} "
            f'parameters are missing, {missing[0]} first.'
        )
    if missing:
        _logger.warning(f"{len(missing)} parameters of '{name}' are not in {_describe(cfg)} and stay random: {missing}")
    return net
