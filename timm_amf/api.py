"""The commands as functions: keywords are their flags, and what they print is what is returned.

`fit`, `advise`, `sweep`, `publish` and `load` are functions where they work; here are the commands that are more than
one function. Each goes the way of its command, so that checks, messages and results are the same.
"""
import contextlib
import importlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, Union

from torch import nn

from timm_amf.engine.evaluation import Row
from timm_amf.engine.opened import RunOptions
from timm_amf.engine.options import keyword_words, parse_args
from timm_amf.engine.run_folder import best_epoch
from timm_amf.errors import CommandParser, UserError, user_errors
from timm_amf.flags import words_of
from timm_amf.parsers import PARSERS, add_run_flags
from timm_amf.tuning import Plan

if TYPE_CHECKING:
    from timm_amf.export import Exported
    from timm_amf.inference.predict import Prediction
    from timm_amf.search.block_search import BlockSearch

__all__ = ['Run', 'evaluate', 'export', 'predict', 'report', 'search', 'train']

Paths = Union[str, Path, Iterable[Union[str, Path]]]


@dataclass(frozen=True)
class Run:
    """What `train` leaves.

    Attributes:
        folder: The run, which `evaluate`, `predict`, `report`, `export` and `publish` take.
        metrics: Validation metrics of the weights that it keeps: `loss`, `top1`, `top5`, ...; none of a dry run.
    """
    folder: Path
    metrics: Mapping[str, float]

    @property
    def model(self) -> nn.Module:
        """The model, with the weights of its best epoch, in evaluation mode."""
        from timm_amf.hub.load import load

        return load(self.folder)


@user_errors()
def train(
        data_dir: Union[str, Path, None] = None,
        model: Optional[str] = None,
        config: Union[str, Path, None] = None,
        plan: Union[str, Path, Plan, Mapping[str, Any], None] = None,
        **options: Any,
) -> Run:
    """Fine-tune a model, as `timm-amf train` does.

    Args:
        data_dir: Folder of the images.
        model: timm architecture, or a composite; else the one of `config`.
        config: Recipe or YAML file that sets options; those given here win.
        plan: How it is fine-tuned, also as a mapping, or the file of a Plan; instead of the one of `config`.
        **options: Flags of `timm-amf train` by name, such as `epochs`, `pretrained`, `output`, `experiment`, `resume`.

    Returns:
        Its folder and the validation metrics of the weights that it keeps; with `eval_only` those of the evaluation.
    """
    plan = Plan.from_dict(plan) if isinstance(plan, Mapping) else plan
    section, plan = (plan.to_dict(), '') if isinstance(plan, Plan) else (None, plan)
    words, data = keyword_words(dict(options, config=config, data_dir=data_dir, model=model, plan=plan))
    folder, metrics = importlib.import_module('train_amf').train(words, args=parse_args(words, data, plan=section))
    return Run(folder, best_epoch(folder) if metrics is None else metrics)


@user_errors()
def search(
        data_dir: Union[str, Path, None] = None,
        model: Optional[str] = None,
        config: Union[str, Path, None] = None,
        ways: Union[str, Sequence[str], None] = None,
        **options: Any,
) -> 'BlockSearch':
    """`search_blocks` with the arguments in the order of `train`, `fit` and `sweep`."""
    from timm_amf.search.block_search import search_blocks

    return search_blocks(model, data_dir, config, ways, **options)


@user_errors()
def evaluate(runs: Paths, ensemble: bool = False, **options: Any) -> list[Row]:
    """Evaluate trained models on labelled images, as `timm-amf evaluate` does.

    Weights without a run are evaluated by `train(..., initial_checkpoint=FILE, eval_only=True).metrics`.

    Args:
        runs: One or several: folders of runs or of published models, files `.onnx`, or `hf-hub:OWNER/NAME`.
        ensemble: Also the average of the probabilities of all.
        **options: Flags of `timm-amf evaluate` by name, such as `split`, `data_dir`, `ten_crop`, `results_file`.

    Returns:
        Metrics of each, of their mean, of their ensemble; of a mixture, of the components of each after it.
    """
    return _run('inference.evaluate', runs, dict(options, ensemble=ensemble))


@user_errors()
def predict(
        source: Union[str, Path, nn.Module],
        paths: Paths,
        topk: int = 1,
        options: Optional[RunOptions] = None,
        progress: bool = False,
        **flags: Any,
) -> Iterator['Prediction']:
    """What a trained model says of images, in their order, computed a batch at a time while they are asked for.

    Args:
        source: Folder of a run, folder of a published model, `hf-hub:OWNER/NAME`, a file of `timm-amf export --format
            onnx`, or a timm model with `label_names` in its `pretrained_cfg`.
        paths: Images, and folders of images, whose subfolders are gone through too.
        topk: Number of classes.
        options: How the model is asked, in place of `flags`.
        progress: Show a bar, if on a terminal.
        **flags: Flags of `timm-amf predict` by name, such as `batch_size`, `img_size`, `ten_crop`, `weights`.

    Raises:
        UserError: If the source cannot be asked, or there are no images; at once, before the first prediction.
    """
    from timm_amf.inference.predict import predict as work
    from timm_amf.inference.sources import options_from

    if options is None:
        parser = CommandParser(add_help=False)
        add_run_flags(parser, data=False)
        options = options_from(parser.parse_args(words_of(parser, flags)))
    elif flags:
        raise UserError(f'predict: takes options or {", ".join(flags)}, not both')
    return work(source, paths, topk, options, progress)


@user_errors()
def report(runs: Paths, output: Union[str, Path, None] = None, **options: Any) -> Path:
    """Write a page of figures and tables about runs, as `timm-amf report` does.

    Args:
        runs: Folder of a run, of a search or of a sweep, or folders of several runs.
        output: Folder of the page. None: `report/` in that of the first run.
        **options: Flags of `timm-amf report` by name, such as `split`, `data_dir`, `no_eval`.

    Returns:
        The page, `index.html`.
    """
    return _run('report', runs, dict(options, output=output))


@user_errors()
def export(
        run: Union[str, Path],
        format: str = 'onnx',
        output: Union[str, Path, None] = None,
        **options: Any,
) -> 'Exported':
    """Write a model to one file that others can run, and check it by running it, as `timm-amf export` does.

    Args:
        run: Folder of a run or of a published model.
        format: `onnx`, `pt2` or `safetensors`.
        output: The file. None: `exported` with the ending of its format, in `run`.
        **options: Flags of `timm-amf export` by name, such as `int8`, `img_size`, `blocks`, `overwrite`.

    Returns:
        The file and what its check found.
    """
    return _run('export', run, dict(options, format=format, output=output))


def _run(command: str, paths: Paths, options: Mapping[str, Any]) -> Any:
    """What a command finds for paths and flags, without what it prints."""
    module = importlib.import_module(f'timm_amf.{command}')
    parser = PARSERS[command.rpartition('.')[2]]()
    words = words_of(parser, options)
    names = [paths] if isinstance(paths, (str, Path)) else paths
    with contextlib.redirect_stdout(io.StringIO()):
        return module.main(parser.parse_args([*words, '--', *map(str, names)]))
