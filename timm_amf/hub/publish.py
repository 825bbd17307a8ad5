"""Publishing a run on the Hub.

    timm-amf publish runs/amf --repo-id me/birds --license apache-2.0 --dry-run staged     (look at it first)
    timm-amf publish runs/amf --repo-id me/birds --license apache-2.0 --private

Everything goes in one commit: what breaks off before leaves the repository as it was, and the next try sends what is
missing. The token is that of the Hub's own client (`hf auth login`, or HF_TOKEN); it is neither printed nor written.
"""
import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Union

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token

from timm_amf.errors import UserError
from timm_amf.hub.card import CardOptions, build_card
from timm_amf.hub.client import check_repo_id, hub_errors, patiently
from timm_amf.hub.stage import OpenRun, is_own_file, open_run, stage
from timm_amf.verbs import VerbParser, run_verb
from timm_amf.version import __version__

__all__ = ['Target', 'check_target', 'main', 'publish']


@dataclass(frozen=True)
class Target:
    """Where a run is published.

    Args:
        repo_id: OWNER/NAME; made if it is not there.
        private: Visible to its owner alone.
        revision: Branch, made if it is not there; None is the main one.
        message: Message of the commit; None says what was published.
        keep_card: Leave the README that the repository has as it is.
    """
    repo_id: str
    private: bool = False
    revision: Optional[str] = None
    message: Optional[str] = None
    keep_card: bool = False

    def __post_init__(self):
        check_repo_id(self.repo_id)


def check_target(target: Target) -> None:
    """Refuses to begin where nobody is logged in; `Target` and `CardOptions` check the rest when they are built.

    Raises:
        UserError: If there is no token.
    """
    if not get_token():
        raise UserError(f'{target.repo_id}: you are not logged in to the Hub; run `hf auth login`')


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
        **card,
) -> Optional[str]:
    """Publish a run.

    Args:
        run: Folder of the run; its data must be where they were, or at `data_dir`: they name the classes.
        repo_id: OWNER/NAME.
        license: Licence of the weights, as the Hub names it.
        private: Visible to the owner alone.
        revision: Branch; None is the main one.
        message: Message of the commit.
        keep_card: Leave the README that the repository has as it is.
        data_dir: Folder of the data, where it is not that of the run.
        compact: Of a SpotTune trained with a global k, publish the plain model that is left.
        results: A file of `timm-amf evaluate --results-file` for the card.
        dry_run: An empty folder to write what would be published to; nothing is sent.
        **card: Further fields of `CardOptions`: `license_name`, `license_link`, `base_models`, `datasets`.

    Returns:
        Address of the commit; None of a dry run.

    Raises:
        UserError: If the run cannot be published, or the Hub does not take it; then the repository is as it was.
    """
    target = Target(repo_id, private, revision, message, keep_card)
    options = CardOptions(license, **card)
    if dry_run is None:
        check_target(target)
    else:
        _check_empty(Path(dry_run))
    opened = open_run(run, data_dir, compact, None if results is None else Path(results))
    readme = build_card(opened, repo_id, options)
    if dry_run is not None:
        _write_whole(opened, readme, license, Path(dry_run))
        return None
    with tempfile.TemporaryDirectory(prefix='timm_amf_publish_') as folder:
        files = stage(opened, Path(folder), readme, license)
        _print_files(files, Path(folder))
        address = _upload(target, files, Path(folder))
    print(f'published: {address}')
    return address


def _check_empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f'--dry-run {folder}: is not empty; name a new folder')


def _write_whole(opened: OpenRun, readme: str, license: str, folder: Path) -> None:
    """Stages beside the folder and renames: it is there whole or not at all."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f'.{folder.name}_', dir=folder.parent) as temporary:
            staged = Path(temporary) / 'staged'
            staged.mkdir()
            files = [folder / p.relative_to(staged) for p in stage(opened, staged, readme, license)]
            staged.replace(folder)
    except OSError as e:
        raise UserError(f'--dry-run {folder}: cannot be written ({e.strerror})') from None
    _print_files(files, folder)
    print(f'nothing was sent; see {folder}')


def _print_files(files: Sequence[Path], folder: Path) -> None:
    for path in files:
        print(f'{path.stat().st_size:>12,}  {path.relative_to(folder).as_posix()}')


def _upload(target: Target, files: Sequence[Path], folder: Path) -> str:
    """Sends all files in one commit, and removes what an earlier one left that is no more."""
    repo = target.repo_id
    api = HfApi(library_name='timm_amf', library_version=__version__)
    with hub_errors(repo, 'write'):
        patiently(lambda: api.create_repo(repo, private=target.private or None, exist_ok=True))
        if target.private and not patiently(lambda: api.model_info(repo)).private:
            raise UserError(f'{repo}: is there already and public; make it private in its settings, or leave --private')
        if target.revision:
            patiently(lambda: api.create_branch(repo, branch=target.revision, exist_ok=True))
        there = patiently(lambda: api.list_repo_files(repo, revision=target.revision))
        names = {path.relative_to(folder).as_posix(): path for path in files}
        written = set(names)
        if target.keep_card and 'README.md' in there:
            del names['README.md']
        # Transfers have the client's own patience, which takes its time; here they are not tried again.
        sent = [_additions(names)]
        api.preupload_lfs_files(repo, sent[0], revision=target.revision, free_memory=False)

        def commit() -> CommitInfo:
            # For each further try anew, so that it is asked what the repository has: a commit whose answer was lost is
            # then found to be there.
            additions = sent.pop() if sent else _additions(names)
            stale = [
                name for name in api.list_repo_files(repo, revision=target.revision)
                if is_own_file(name) and name not in written]
            return api.create_commit(
                repo, [*additions, *map(CommitOperationDelete, stale)], revision=target.revision,
                commit_message=target.message or f'timm_amf {__version__}: weights and card')

        return patiently(commit).commit_url


def _additions(files: Mapping[str, Path]) -> list[CommitOperationAdd]:
    return [CommitOperationAdd(name, path) for name, path in files.items()]


# ---- the verb


def _parser() -> argparse.ArgumentParser:
    parser = VerbParser(
        prog='timm-amf publish',
        description='Publish a run on the Hugging Face Hub: weights, configuration, Plan, options, results and card.',
        epilog='Log in with `hf auth login` first.')
    add = parser.add_argument
    add('run', metavar='RUN', help='folder of the run')
    add('--repo-id', required=True, metavar='OWNER/NAME', help='repository; made if it is not there')
    add('--license', default='', metavar='ID', help='licence of the weights, as the Hub names it: apache-2.0, mit, ...')
    add('--license-name', metavar='NAME', help='name of a licence that is other')
    add('--license-link', metavar='URL', help='where a licence that is other can be read')
    add('--private', action='store_true', help='visible to you alone')
    add('--revision', metavar='BRANCH', help='branch; made if it is not there (default: main)')
    add('-m', '--commit-message', metavar='TEXT', help='message of the commit')
    add('--keep-card', action='store_true', help='leave the README.md that the repository has as it is')
    add('--data-dir', metavar='DIR', help='folder of the data, which name the classes (default: where the run had it)')
    add('--compact', action='store_true', help='publish the plain model that SpotTune with --global-k leaves')
    add('--results', metavar='FILE', help='results of timm-amf evaluate --results-file for the card')
    add('--base-model', action='append', metavar='HUB_ID', help='model that it started from (default: found in the '
        'run); repeatable')
    add('--dataset', action='append', metavar='NAME', help='Hub id or name of the data (default: of the components); '
        'repeatable')
    add('--dry-run', metavar='DIR', help='write what would be published to a new folder, list it, and send nothing')
    return parser


def main(argv: Sequence[str]) -> int:
    """Run `timm-amf publish`; returns the exit code."""
    return run_verb('timm-amf publish', lambda: _run(argv), 'interrupted; the repository is as it was')


def _run(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    publish(
        args.run, args.repo_id, args.license, private=args.private, revision=args.revision,
        message=args.commit_message, keep_card=args.keep_card, data_dir=args.data_dir, compact=args.compact,
        results=args.results, dry_run=args.dry_run, license_name=args.license_name, license_link=args.license_link,
        base_models=args.base_model, datasets=args.dataset)
