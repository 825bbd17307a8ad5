"""Commands that run in forks of this process, and what becomes of them, for `robustness.py`."""
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Optional

__all__ = ['ROOT', 'Case']

ROOT = Path(__file__).resolve().parents[1]
LIMIT, MEMORY, LINES = 60, 10 << 30, 20  # seconds, bytes and lines that a case may take


class Case:
    """Forks commands in a folder of its own and keeps the worst outcome of them."""

    def __init__(self, folder: Path, rng: random.Random):
        self.folder, self.rng, self.outcome, self.detail, self.last = folder, rng, 'fine', '', ''
        # Devices by names of their own, so that nothing is written outside the folder.
        os.mkfifo(folder / 'fifo')
        for name, device in (('zero', '/dev/zero'), ('null_device', '/dev/null')):
            (folder / name).symlink_to(device)

    def fault(self, outcome: str, detail: str) -> None:
        if self.outcome == 'fine':
            self.outcome, self.detail = outcome, detail

    def run(
            self,
            work: Callable[[], Optional[int]],
            limit: float = LIMIT,
            signum: int = 0,
            after: float = 0.,
    ) -> int:
        """The exit code of a function in a fork, which gets a signal `after` some seconds if `signum` is given."""
        out, started, sent = self.folder / 'out.txt', time.monotonic(), False
        out.touch()
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            _child(work, self.folder, out)
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            seconds = time.monotonic() - started
            if done:
                break
            if signum and not sent and seconds >= after:
                os.kill(pid, signum)
                sent = True
            if seconds > limit:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                self.fault('hang', f'{limit:g} s')
                return -signal.SIGKILL
            time.sleep(0.01)
        code, text = os.waitstatus_to_exitcode(status), out.read_text(errors='replace')
        errors = [line for line in text.splitlines() if not line.startswith(('epoch ', 'done in '))]
        if 'Traceback (most' in text or code not in (0, 2) and not (sent and code in (130, 143, -signum)):
            files = sorted(self.folder.glob('timm_amf-traceback-*'), key=os.path.getmtime)
            self.fault('traceback', f'{code}: {_brief(files[-1].read_text() if files else text)}')
        elif code == 2 and (len(errors) > LINES or max(map(len, errors), default=0) > 2000 or not errors):
            self.fault('wordy', f'{len(errors)} lines: {text[:200]!r}')
        if (self.folder / 'marker').exists():
            self.fault('payload', text[-200:])
        self.last = (errors or [''])[-1]
        return code


def _child(work: Callable[[], Optional[int]], folder: Path, out: Path) -> None:
    code = 1
    try:
        os.setsid()
        handle = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.chdir(folder)
        os.environ['XDG_CACHE_HOME'] = str(folder / 'cache')
        tempfile.tempdir = str(folder)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        code = work() or 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _brief(text: str) -> str:
    lines = text.strip().splitlines()
    where = [line.split(str(ROOT) + '/')[-1].strip() for line in lines if line.strip().startswith('File ')]
    ours = [w for w in where if w.startswith(('timm_amf', 'train_amf'))]
    return ' | '.join([*ours[-1:], *where[-1:], (lines or [''])[-1][:200]])
