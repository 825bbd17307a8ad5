"""The folder of a run: whether it may be written, and what resumes from it."""
import argparse
from pathlib import Path
from typing import Optional

from timm_amf.engine.checkpoint import Checkpointer
from timm_amf.errors import UserError

__all__ = ['find_resume', 'prepare_folder']


def find_resume(args: argparse.Namespace, folder: Path) -> Optional[Path]:
    """The `last/` folder that `--resume` names, or None where there is nothing to resume.

    `auto` takes that of the experiment if there is one; else a path: a run's folder, or its `last/`.

    Raises:
        UserError: If the path holds no checkpoint of this script, or `auto` has no experiment to look in.
    """
    if not args.resume:
        return None
    if args.resume == 'auto':
        if not args.experiment:
            raise UserError('--resume auto looks in the folder of the experiment; name it with --experiment')
        source = folder
    else:
        source = Path(args.resume)
        if source.is_file():
            raise UserError(
                f'--resume {source}: is a file; give the folder of a run, '
                f'or start from weights with --initial-checkpoint')
        source = source.parent if source.name == 'last' else source
    last = Checkpointer(source).last
    found = _has_checkpoint(source)
    if not found and args.resume != 'auto':
        raise UserError(f'--resume {args.resume}: no checkpoint there; give the folder of a run, or its last/')
    return last if found else None


def _has_checkpoint(folder: Path) -> bool:
    return any((folder / name / 'state.json').exists() for name in ('last', 'last.new', 'last.old'))


def prepare_folder(args: argparse.Namespace, folder: Path, resume: Optional[Path]) -> None:
    """Make the run's folder; finish what a kill broke off in the one that is resumed.

    Raises:
        UserError: If the folder holds another run and neither `--resume` nor `--overwrite` was given, or it cannot be
            made.
    """
    if resume is not None:
        Checkpointer(resume.parent).settle()
    elif not args.overwrite and _has_checkpoint(folder):
        raise UserError(f'{folder}: holds a run already; continue it with --resume auto, or add --overwrite')
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f'{folder}: cannot be made ({e.strerror}); choose another --output') from None
    if resume is None and args.overwrite:
        # A resume must not find the run that this one replaces.
        Checkpointer(folder).discard()
