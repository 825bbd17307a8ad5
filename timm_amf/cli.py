"""The `timm-amf` command: one subcommand for each thing to do."""
import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import Optional

from timm_amf.errors import run_command, without_traceback_flag

__all__ = ['main']

# Subcommand -> module whose `main(argv)` does it, and what it does.
_COMMANDS = {
    'fit': ('timm_amf.search.fit', 'fine-tune by measuring: a few ways on your images, the best to the end'),
    'demo': ('timm_amf.demo', 'fine-tune from real weights on embedded images, in three minutes'),
    'train': ('train_amf', 'fine-tune a model: the flags of train_amf.py'),
    'evaluate': (
        'timm_amf.inference.evaluate', 'evaluate runs from their folders, or a checkpoint with the flags of train'),
    'predict': ('timm_amf.inference.predict', 'classes and probabilities of images, by a run, a model or a file'),
    'report': ('timm_amf.report', 'a page of figures and tables of a run, of several, or of a search'),
    'models': ('timm_amf.engine.listing', 'list the models, their tags, the recipes, and what is published'),
    'advise': (
        'timm_amf.search.advise', 'measure how well pretrained weights fit the data, and write a Plan'),
    'search': (
        'timm_amf.search.block_search', 'find the layers, blocks or windows worth tuning, and write a Plan'),
    'decathlon': (
        'timm_amf.engine.submission', 'score test accuracies on the Visual Decathlon, or write its submission file'),
    'export': ('timm_amf.export', "write a run's model to an ONNX, TorchScript or safetensors file, checked"),
    'publish': ('timm_amf.hub.publish', 'publish a run on the Hugging Face Hub'),
}
# What there is to say after Ctrl-C.
_INTERRUPTED = {
    'fit': 'interrupted; the same command goes on where it stopped',
    'advise': 'interrupted; features that were finished are kept',
    'search': 'interrupted; the same command goes on where it stopped',
    'publish': 'interrupted; the repository is as it was',
}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run one subcommand.

    Returns:
        The exit code, see `errors.run_command`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ('-h', '--help'):
        print('usage: timm-amf COMMAND ...\n')
        for name, (_, text) in _COMMANDS.items():
            print(f'  {name:10}{text}')
        print('\ntimm-amf COMMAND --help tells more; --traceback shows where an error comes from.')
        return 0 if argv else 2
    if argv[0] == '--version':
        from timm_amf.version import __version__

        print(f'timm_amf {__version__}')
        return 0
    if argv[0] not in _COMMANDS:
        near = difflib.get_close_matches(argv[0], _COMMANDS, 1)
        hint = f'did you mean {near[0]}?' if near else f'there are {", ".join(_COMMANDS)}'
        print(f'timm-amf: error: no command {argv[0]!r}; {hint}', file=sys.stderr)
        return 2
    return _run(argv[0], argv[1:])


def _run(command: str, argv: Sequence[str]) -> int:
    words, show_traceback = without_traceback_flag(argv)

    def work() -> Optional[int]:
        name = command
        if command == 'evaluate' and not importlib.import_module(_COMMANDS[command][0]).is_for_runs(words):
            name = 'train'
            words.append('--eval-only')
        if name == 'train':
            return importlib.import_module('train_amf').train(words)
        return importlib.import_module(_COMMANDS[name][0]).main(words)

    return run_command(f'timm-amf {command}', work, _INTERRUPTED.get(command, 'interrupted'), show_traceback)


if __name__ == '__main__':
    sys.exit(main())
