"""Where pretrained weights come from, and one line for the user when they cannot be had or do not fit."""
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional, Union

from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from torch import nn

from ..errors import UserError
from .tags import unpublished, unpublished_name

__all__ = ['check_source', 'has_source', 'loading']

_logger = logging.getLogger(__name__)

# What timm looks for in a Hub repository, in its order.
_HUB_FILES = ('model.safetensors', 'pytorch_model.bin')
# Seconds that the Hub gets to answer before a run without network fails.
_HUB_TIMEOUT = 5.0
_LOCAL_COPY = "name a local copy with pretrained_cfg_overlay={'file': ...} in its keyword arguments"


def _describe(cfg: dict[str, Any]) -> str:
    if cfg.get('state_dict'):
        return 'the given state dict'
    if cfg.get('file'):
        return f"file {cfg['file']}"
    if cfg.get('hf_hub_id'):
        return f"Hub repository {cfg['hf_hub_id']}"
    return str(cfg.get('url'))


def _unreachable(name: str, cfg: dict[str, Any], reason: BaseException) -> UserError:
    what = f"the pretrained weights of '{name}' from {_describe(cfg)} ({type(reason).__name__})"
    if cfg.get('file'):
        return UserError(f'cannot read {what}.')
    return UserError(
        f'cannot get {what}: go online once so that they are cached, {_LOCAL_COPY}, or pass pretrained=False.'
    )


def has_source(cfg: dict[str, Any]) -> bool:
    """Whether a `pretrained_cfg` names weights at all; some architectures were never published with any."""
    return any(cfg.get(key) for key in ('state_dict', 'file', 'hf_hub_id', 'url'))


def check_source(name: str, cfg: dict[str, Any], cache_dir: Optional[Union[str, Path]] = None) -> None:
    """Checks that weights can be had, before anything is built or downloaded.

    `hf_hub_download` retries for most of a minute where there is no network, and then names neither model nor file.

    Args:
        name: Whose weights, for the message.
        cfg: Its `pretrained_cfg`.
        cache_dir: As in `timm.create_model`.

    Raises:
        UserError: If they cannot be had.
    """
    if cfg.get('state_dict'):
        return
    if cfg.get('file'):
        if not Path(cfg['file']).exists():
            raise UserError(f"the weights file of '{name}' does not exist: {cfg['file']}")
    elif cfg.get('hf_hub_id'):
        _check_hub(name, cfg, cache_dir)
    elif not cfg.get('url'):
        raise UserError(f"timm has no pretrained weights for '{name}': {_LOCAL_COPY}, or pass pretrained=False.")


def _check_hub(name: str, cfg: dict[str, Any], cache_dir: Optional[Union[str, Path]]) -> None:
    repo, _, revision = cfg['hf_hub_id'].partition('@')
    files = (cfg['hf_hub_filename'],) if cfg.get('hf_hub_filename') else _HUB_FILES
    if any(isinstance(try_to_load_from_cache(repo, f, cache_dir, revision or None), str) for f in files):
        return
    tag = unpublished_name(cfg)
    try:
        get_hf_file_metadata(hf_hub_url(repo, files[0], revision=revision or None), timeout=_HUB_TIMEOUT)
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError) as e:
        if tag and type(e) is RepositoryNotFoundError:
            raise UserError(unpublished(tag, f'the Hub has no public {repo}')) from e
        raise UserError(
            f"the pretrained weights of '{name}' are not at {_describe(cfg)} ({type(e).__name__}): check the name, "
            'or log in with `hf auth login` if it is private.'
        ) from e
    except EntryNotFoundError as e:
        if cfg.get('hf_hub_filename'):
            raise UserError(f"{_describe(cfg)} has no {files[0]} for '{name}'; ask its owner for it.") from e
        # the repository answers; timm tries its other file names
    except Exception as e:  # the Hub's client raises its HTTP library's own types, which differ between versions
        if tag:
            raise UserError(unpublished(tag, f'as far as this version knows; {type(e).__name__} for {repo}')) from e
        raise _unreachable(name, cfg, e) from e


@contextmanager
def loading(name: str, cfg: dict[str, Any], classifiers: tuple[str, ...] = ()) -> Iterator[None]:
    """Around a load by timm: its errors become one line, and weights that were not in the file do not pass unseen.

    timm loads without `strict` whenever the number of classes differs and logs what it missed at INFO, so that the
    weights of another architecture would leave a network random.

    Args:
        name: What is loaded, for the message.
        cfg: Its `pretrained_cfg`.
        classifiers: Module names that may stay random.

    Raises:
        UserError: If the weights cannot be read, or are not those of the network.
    """
    original = nn.Module.load_state_dict
    missed = []

    def watched(module, state_dict, *args, **kwargs):
        result = original(module, state_dict, *args, **kwargs)
        missed.append((module, result.missing_keys))
        return result

    nn.Module.load_state_dict = watched
    try:
        yield
    except (UserError, TypeError):  # an unknown keyword is a TypeError in timm, here too
        raise
    except OSError as e:
        raise _unreachable(name, cfg, e) from e
    except Exception as e:  # safetensors, pickle and shape errors: all mean that this file is not the one
        reason = ' '.join(str(e).split())[:200] or type(e).__name__
        raise UserError(f"cannot load the weights of '{name}' from {_describe(cfg)}: {reason}") from e
    finally:
        nn.Module.load_state_dict = original
    for module, keys in missed:
        _report_missing(name, cfg, module, [k for k in keys if k.rpartition('.')[0] not in classifiers])


def _report_missing(name: str, cfg: dict[str, Any], module: nn.Module, missing: list[str]) -> None:
    parameters = {n for n, _ in module.named_parameters()}
    missing = [k for k in missing if k in parameters]
    if len(missing) > 0.5 * len(parameters):
        raise UserError(
            f"{_describe(cfg)} does not hold the weights of '{name}': {len(missing)} of its {len(parameters)} "
            f'parameters are missing, {missing[0]} first.'
        )
    if missing:
        _logger.warning(f"{len(missing)} parameters of '{name}' are not in {_describe(cfg)} and stay random: {missing}")
