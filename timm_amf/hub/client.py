"""Talking to the Hub: what goes wrong as one line for the user, and a second try where it helps."""
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Optional, TypeVar

from huggingface_hub import errors
from huggingface_hub.utils import validate_repo_id

from timm_amf.errors import UserError

__all__ = ['check_repo_id', 'hub_errors', 'patiently', 'status_of']

_logger = logging.getLogger(__name__)

T = TypeVar('T')

# Answers that a later request may better: rate limits and the server's own trouble.
_TRANSIENT = (408, 429, 500, 502, 503, 504)
# Seconds before each further try, where the Hub does not say how long to wait.
_WAITS = (1., 2., 4.)
_LONGEST_WAIT = 60.


def check_repo_id(repo_id: str) -> None:
    """Refuses what cannot be the name of a repository.

    Raises:
        UserError: If it is not of the form OWNER/NAME.
    """
    try:
        validate_repo_id(repo_id)
        valid = repo_id.count('/') == 1
    except errors.HFValidationError:
        valid = False
    if not valid:
        raise UserError(
            f'{repo_id!r} cannot be a repository of the Hub; write OWNER/NAME of letters, digits, "-", "_" and "."')


def _chain(error: Optional[BaseException]) -> Iterator[BaseException]:
    """The exception and those that led to it: the client wraps the answer of an upload's thread in its own error."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def status_of(error: BaseException) -> Optional[int]:
    """HTTP status of the answer that an error comes from, None where there was no answer."""
    for e in _chain(error):
        status = getattr(getattr(e, 'response', None), 'status_code', None)
        if status is not None:
            return int(status)
    return None


def _retry_after(error: BaseException) -> Optional[float]:
    for e in _chain(error):
        response = getattr(e, 'response', None)
        value = response.headers.get('Retry-After') if response is not None else None
        if value and value.isdigit():
            return float(value)
    return None


def patiently(call: Callable[[], T]) -> T:
    """Calls a request of the client again where a later try may succeed: rate limits, 5xx, a connection that broke.

    The client does so itself for transfers, and not for creating a repository or committing. A commit that is sent
    twice is one commit: the client leaves out files that the repository has already.
    """
    for wait in (*_WAITS, None):
        try:
            return call()
        except Exception as e:  # the client raises its HTTP library's own types, which differ between versions
            status = status_of(e)
            again = status in _TRANSIENT if status is not None else _broke_off(e)
            asked = _retry_after(e)
            if wait is None or not again or (asked or 0.) > _LONGEST_WAIT:
                raise
            wait = wait if asked is None else asked
            _logger.warning(f'the Hub {_trouble(e)}; trying again in {wait:g} s')
            time.sleep(wait)
    raise AssertionError('unreachable')


def _broke_off(error: BaseException) -> bool:
    """Whether a connection failed, not a check of the client's or a file on this machine."""
    if any(isinstance(e, (errors.OfflineModeIsEnabled, errors.HFValidationError)) for e in _chain(error)):
        return False
    transport = ('httpx', 'httpx2', 'httpcore', 'requests', 'urllib3')
    return any(
        isinstance(e, (ConnectionError, TimeoutError)) or type(e).__module__.split('.')[0] in transport
        for e in _chain(error))


def _trouble(error: BaseException) -> str:
    status = status_of(error)
    if status is not None:
        return f'answered {status}'
    return f'broke the connection off ({type(error).__name__})'


@contextmanager
def hub_errors(repo: str, doing: str) -> Iterator[None]:
    """Around requests of the client: what goes wrong becomes one line that names the repository and the remedy.

    Args:
        repo: The repository, for the message.
        doing: What was tried, such as `read` or `write`.

    Raises:
        UserError: In the place of every error of the client's.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as e:  # the client raises its HTTP library's own types, which differ between versions
        raise UserError(f'{repo}: {_explain(e, doing)}') from e


def _explain(error: BaseException, doing: str) -> str:
    chain = list(_chain(error))

    def found(*kinds: type) -> bool:
        return any(isinstance(e, kinds) for e in chain)

    status = status_of(error)
    if found(errors.LocalTokenNotFoundError):
        return 'you are not logged in to the Hub; run `hf auth login`'
    if found(errors.OfflineModeIsEnabled):
        return 'the Hub is switched off (HF_HUB_OFFLINE) and the files are not in the cache; unset it and try again'
    if found(errors.GatedRepoError):
        return 'is gated: accept its terms on its page, and log in with `hf auth login`'
    if found(errors.RevisionNotFoundError):
        return 'has no such revision; give a branch, a tag or a commit that it has'
    if status == 401 and doing == 'write':
        return 'the Hub does not accept your token (401); log in again with `hf auth login`'
    if found(errors.RepositoryNotFoundError):
        return f'there is no such repository, or it is private ({status}); check the name, or run `hf auth login`'
    if status == 401:
        return 'the Hub does not accept your token (401); log in again with `hf auth login`'
    if status == 403:
        return f'your token may not {doing} it (403); use one that may, or another repository'
    if found(errors.RemoteEntryNotFoundError):
        return f'has not the file that was asked for ({_line(error)})'
    if status == 429:
        after = _retry_after(error)
        return f'the Hub limits your requests (429); try again {f"in {after:g} s" if after else "later"}'
    if status is not None and status >= 500:
        return f'the Hub is in trouble ({status}); nothing was changed; try again later'
    if status is not None:
        return f'the Hub refused ({status}): {_line(error)}'
    if any('Consistency check failed' in str(e) for e in chain):
        return 'a file broke off while it came; nothing was loaded; try again'
    if _broke_off(error) or found(errors.LocalEntryNotFoundError):
        return f'the Hub cannot be reached, or broke off ({type(chain[-1]).__name__}); check the network and try again'
    return f'cannot {doing} it: {_line(error)}'


def _line(error: BaseException) -> str:
    """The error's first words on one line."""
    return ' '.join(str(error).split())[:200] or type(error).__name__
