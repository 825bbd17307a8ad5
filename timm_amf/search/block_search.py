"""`timm-amf search`: find the layers, blocks or windows that are worth tuning (the block-wise paper).

    timm-amf search DIR --model resnet50
    timm-amf search DIR --model resnet50 --ways layer block window top3 top5 --budget 30
    timm-amf search DIR --model vgg16 --protocol paper --experiment vgg16-0 --seed 0
    timm-amf search --compare RUN RUN ...
    train_amf.py --config RUN/best.yaml

It takes the flags of train_amf.py, so the search is for the run that these name.
"""
import argparse
import logging
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional, Union

import torch
import yaml

from timm_amf.engine.config_file import find_config
from timm_amf.errors import UserError
from timm_amf.search.block_tables import methods_table, write_methods_csv
from timm_amf.search.results import SearchResults
from timm_amf.search.search_flags import PAPER_OPTIONS, build_search_parser, parse_search_args
from timm_amf.search.search_run import BlockSearch, Search
from timm_amf.verbs import run_verb

__all__ = ['BlockSearch', 'main', 'search_blocks']


def search_blocks(
        model: Optional[str] = None,
        data_dir: Union[str, Path, None] = None,
        config: Union[str, Path, None] = None,
        ways: Union[str, Sequence[str], None] = None,
        progress: bool = True,
        **options,
) -> BlockSearch:
    """Find the layers, blocks or windows of layers that are worth tuning (Algorithms 1 and 2 of the block-wise paper).

    Args:
        model: timm model, or a composite.
        data_dir: Folder of the data; other data are among the options, or a section `data` of the recipe's form.
        config: Recipe or YAML file that sets options; those given here win.
        ways: What to choose from: `layer`, `block`, `window`, and `topK` such as `top3`. Without it `block`, or those
            of the protocol.
        progress: Show a bar.
        **options: Flags of `timm-amf search` and of `train_amf.py` by name.

    Returns:
        Results, Plan and the file for `train_amf.py`; `print` shows tables.

    Raises:
        UserError: On a mistake in options or data.
    """
    content: dict[str, Any] = {}
    if config is not None:
        content = yaml.safe_load(find_config(str(config)).read_text(encoding='utf-8')) or {}
        content = {k: v for k, v in content.items() if k != 'explicit'}
    if options.get('protocol'):
        content = {**content, **PAPER_OPTIONS}
    actions = {a.dest: a for a in build_search_parser()._actions if a.dest not in ('help', 'compare', 'table_file')}
    argv = [] if ways is None else ['--ways', *([ways] if isinstance(ways, str) else ways)]
    for name, value in options.items():
        if name not in actions:
            content[name] = value
        elif actions[name].nargs == 0:
            argv += [actions[name].option_strings[-1]] if value else []
        elif value is not None:
            argv += [actions[name].option_strings[-1], str(value)]
    content.update({k: str(v) for k, v in dict(model=model, data_dir=data_dir).items() if v is not None})
    with tempfile.TemporaryDirectory(prefix='timm_amf-') as folder:
        path = Path(folder) / 'options.yaml'
        path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}), encoding='utf-8')
        try:
            own, args = parse_search_args([*argv, '--config', str(path)], preset=False)
        except UserError as e:
            raise UserError(str(e).replace(str(path), 'search_blocks')) from e.__cause__
    with torch.random.fork_rng():
        return Search(own, args, progress).run()


def _compare(own: argparse.Namespace) -> None:
    searches = [SearchResults.read(Path(run) / 'results.json') for run in own.compare]
    print(methods_table(searches))
    if own.table_file:
        from timm_amf.search.block_plots import plot_methods

        write_methods_csv(searches, own.table_file)
        plot_methods(searches, Path(own.table_file).with_suffix('.png'))


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The verb `search`: print the tables, write the files. Returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format='%(levelname)s: %(message)s')
    argv = list(sys.argv[1:] if argv is None else argv)
    return run_verb(
        'timm-amf search', lambda: _search(argv),
        'interrupted; the same command with --resume auto and its --experiment goes on')


def _search(argv: Sequence[str]) -> None:
    own, _ = build_search_parser().parse_known_args(argv)
    if own.help:
        build_search_parser().print_help()
        return
    if own.compare:
        _compare(own)
        return
    search = Search(*parse_search_args(argv), progress=True)
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        found = search.run()
    finally:
        signal.signal(signal.SIGTERM, previous)
    if search.accelerator.is_main_process:
        print(found)
        print(f'\nRun it: train_amf.py --config {found.folder / "best.yaml"}')
