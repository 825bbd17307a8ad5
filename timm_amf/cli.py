"""The `timm-amf` command: one verb for each thing to do."""
import difflib
import sys
from collections.abc import Sequence
from typing import Optional

__all__ = ['main']


def _train(argv: list[str]) -> int:
    """fine-tune a model: the flags of train_amf.py"""
    import train_amf

    return train_amf.main(argv)


def _evaluate(argv: list[str]) -> int:
    """evaluate runs from their folders, or a checkpoint with the flags of train_amf.py"""
    from timm_amf.engine.evaluate_runs import is_for_runs
    from timm_amf.engine.evaluate_runs import main as evaluate_main

    if is_for_runs(argv):
        return evaluate_main(argv)
    import train_amf

    return train_amf.main([*argv, '--eval-only'])


def _advise(argv: list[str]) -> int:
    """measure how well pretrained weights fit the data, and write a Plan: the flags of train_amf.py"""
    from timm_amf.search.advise import main as advise_main

    return advise_main(argv)


def _search(argv: list[str]) -> int:
    """find the layers, blocks or windows worth tuning, and write a Plan: the flags of train_amf.py"""
    from timm_amf.search.block_search import main as search_main

    return search_main(argv)


def _models(argv: list[str]) -> int:
    """list the models, their tags, the recipes, and what is published"""
    from timm_amf.engine.listing import main as models_main

    return models_main(argv)


def _decathlon(argv: list[str]) -> int:
    """score test accuracies on the Visual Decathlon, or write its submission file"""
    from timm_amf.engine.submission import main as run

    return run(argv)


def _export(argv: list[str]) -> int:
    """write a run's model to an ONNX, TorchScript or safetensors file, checked against the model"""
    from timm_amf.export import main as export_main

    return export_main(argv)


def _publish(argv: list[str]) -> int:
    """publish a run on the Hugging Face Hub"""
    from timm_amf.hub.publish import main as publish_main

    return publish_main(argv)


_VERBS = {
    'train': _train,
    'evaluate': _evaluate,
    'models': _models,
    'advise': _advise,
    'search': _search,
    'decathlon': _decathlon,
    'export': _export,
    'publish': _publish,
}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run one verb.

    Returns:
        The exit code: 2 for a mistake on the command line.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ('-h', '--help'):
        print('usage: timm-amf VERB ...\n')
        for name, verb in _VERBS.items():
            print(f'  {name:10}{verb.__doc__}')
        print('\ntimm-amf VERB --help tells more.')
        return 0 if argv else 2
    if argv[0] == '--version':
        from timm_amf.version import __version__

        print(f'timm_amf {__version__}')
        return 0
    if argv[0] not in _VERBS:
        near = difflib.get_close_matches(argv[0], _VERBS, 1)
        hint = f'did you mean {near[0]}?' if near else f'there are {", ".join(_VERBS)}'
        print(f'timm-amf: error: no verb {argv[0]!r}; {hint}', file=sys.stderr)
        return 2
    return _VERBS[argv[0]](argv[1:])


if __name__ == '__main__':
    sys.exit(main())
