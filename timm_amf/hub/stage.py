"""From the folder of a run to the folder that is published: weights, what explains them, and nothing private.

    model.safetensors   the best weights
    config.json         as timm reads it: architecture, arguments, input, class names; under `timm_amf` the data
    plan.yaml           how it was fine-tuned
    args.yaml           the options of the run, without what is of the machine it ran on
    summary.csv, policy.csv, metrics.json, figures/
    README.md           the card

What is staged is loaded back and compared with the run's model before anybody sees it.
"""
import csv
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

import timm
import torch
import yaml
from huggingface_hub import get_token
from timm.data import resolve_data_config
from timm.models import get_arch_name
from timm.models._hub import save_config_for_hf
from torch import nn

from timm_amf.data import Mixture, check_images, create_datasets, data_spec_from_args, splits_from_args
from timm_amf.engine.checkpoint import save_weights, write_text
from timm_amf.engine.config_file import read_config
from timm_amf.engine.intervals import wilson_interval
from timm_amf.engine.options import build_parser
from timm_amf.engine.run_folder import is_run, load_run, read_run
from timm_amf.errors import UserError
from timm_amf.hub.safety import WEIGHTS, check_fits
from timm_amf.hub.safety import read_config as read_checked
from timm_amf.models.method import method_of
from timm_amf.tuning import Plan
from timm_amf.version import __version__

__all__ = ['OpenRun', 'Result', 'fixed_paths', 'is_own_file', 'open_run', 'stage']

_FILES = (
    WEIGHTS, 'config.json', 'plan.yaml', 'args.yaml', 'summary.csv', 'policy.csv', 'metrics.json', 'README.md')
_FIGURES = ('.png', '.svg', '.jpg')
_DATA_KEYS = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')
# Options that are of the machine or the occasion, not of what was trained.
_PRIVATE = (
    'output', 'experiment', 'resume', 'overwrite', 'cache_dir', 'tracker', 'log_wandb', 'wandb_project', 'wandb_tags',
    'wandb_resume_id', 'no_progress', 'publish', 'publish_license', 'publish_private', 'publish_revision',
    'publish_message',
)
# Of a network's arguments, where its weights came from; its own are in the file now.
_SOURCES = ('url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'source', 'custom_load')
# A folder of this machine, at the start of a value or behind the '=' or ',' of a component.
_FOLDER = re.compile(
    r'(?P<before>^|[=,;\s]|\bhfds/)(?:~|\.{1,2}|[A-Za-z]:)?[/\\](?:[^,;=\s]*[/\\])?(?P<name>[^,;=\s/\\]*)[/\\]?')
_WHOLE_FOLDER = re.compile(r'(?:~[^/\\]*|\.{1,2}|[A-Za-z]:)?[/\\]')
_TOKEN = re.compile(r'\bhf_[A-Za-z0-9]{20,}')


@dataclass(frozen=True)
class Result:
    """Accuracy of one part of the data.

    Args:
        data: Name of the component, '' for all images.
        split: Split of the data.
        images: Number of images.
        top1: Percent.
        low: Lower limit of the interval of 95 %, percent.
        high: Upper limit.
        top5: Percent, None where it was not recorded.
        how: How it was evaluated, in words.
        runs: `mean of N runs` or `ensemble of N runs`, '' for the run that is published.
    """
    data: str
    split: str
    images: int
    top1: float
    low: float
    high: float
    top5: Optional[float]
    how: str
    runs: str = ''


@dataclass
class OpenRun:
    """A run, its model and its data, as they are published.

    Args:
        folder: The run's folder.
        args: Its options, as `read_run` gives them.
        own: Its options as it was started with them, `pretrained` among them.
        plan: How it was fine-tuned.
        model: With the best weights, in evaluation mode, on the CPU.
        trained: The model that was trained; another than `model` where that is compacted.
        train: Its training images.
        val: The images that it was validated on.
        results: What it came to.
        epoch: Epoch of the best weights, from 0; None where no epoch was evaluated.
    """
    folder: Path
    args: Any
    own: dict[str, Any]
    plan: Plan
    model: nn.Module
    trained: nn.Module
    train: Mixture
    val: Mixture
    results: list[Result] = field(default_factory=list)
    epoch: Optional[int] = None

    @property
    def compacted(self) -> bool:
        return self.model is not self.trained

    @property
    def spec(self):
        return data_spec_from_args(self.args, self.args.recipe.get('data'))


def open_run(
        run: Union[str, Path],
        data_dir: Optional[str] = None,
        compact: bool = False,
        results: Optional[Path] = None,
) -> OpenRun:
    """Opens a run to publish it; its data must be there, for they name its classes.

    Args:
        run: Folder of the run.
        data_dir: Folder of the data, where it is not that of the run.
        compact: Take the plain model that a global policy leaves.
        results: A file of `timm-amf evaluate --results-file`, whose rows go before the run's own.

    Raises:
        UserError: If run, data or results are not there, or there is nothing to compact.
    """
    if not is_run(run):
        raise UserError(f'{run}: no args.yaml there; give the folder of a run')
    folder = Path(run)
    args = read_run(folder, ['--data-dir', data_dir] if data_dir else [])
    channels = args.in_chans or (args.input_size[0] if args.input_size else 3)
    spec, splits = data_spec_from_args(args, args.recipe.get('data')), splits_from_args(args)
    train, val = create_datasets(spec, splits, in_chans=channels)
    if args.skip_bad_images:
        check_images(val, True, args.cache_dir, args.workers, False)
    plan = Plan.from_yaml(folder / 'plan.yaml')
    model = trained = load_run(args, folder, train.num_classes)
    if compact:
        if 'global_k' not in method_of(trained).takes or plan.global_k is None:
            raise UserError(f'{run}: --compact needs a SpotTune that was trained with --global-k; leave it out')
        model = trained.compact(plan.global_k).eval()
    own, _, _ = read_config(folder / 'args.yaml', build_parser())
    opened = OpenRun(folder, args, own, plan, model, trained, train, val)
    opened.epoch, opened.results = _own_results(opened, splits[1])
    if results is not None:
        opened.results = [*_evaluated(results, folder.resolve().name), *opened.results]
    return opened


# -- what it came to --------------------------------------------------------------------------------------------------


def _own_results(run: OpenRun, split: str) -> tuple[Optional[int], list[Result]]:
    """The best epoch of `summary.csv`, by the metric of the run, and its accuracies."""
    metric = f'eval_{run.args.eval_metric}'
    rows = [row for row in _rows(run.folder / 'summary.csv') if row.get(metric)]
    if not rows:
        return None, []
    sign = -1 if run.args.eval_metric == 'loss' else 1
    best = max(rows, key=lambda row: sign * float(row[metric]))  # of equal ones the first, as the run
    how = f'one crop, after epoch {int(best["epoch"]) + 1} of {len(_rows(run.folder / "summary.csv"))}, the best on it'
    counts = {'': len(run.val)}
    if len(run.val.components) > 1:
        counts.update({n: int((run.val.component_of == i).sum()) for i, n in enumerate(run.val.components)})
    results = []
    for name, images in counts.items():
        top1 = best.get(f'eval_top1_{name}' if name else 'eval_top1')
        if top1 and images:
            top5 = None if name else float(best['eval_top5'])
            low, high = wilson_interval(float(top1) / 100 * images, images)
            results.append(Result(name, split, images, float(top1), 100 * low, 100 * high, top5, how))
    return int(best['epoch']), results


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


def _evaluated(path: Path, run: str) -> list[Result]:
    """The rows of a file of `timm-amf evaluate --results-file` that are of a run, and those of all runs together."""
    if not path.is_file():
        raise UserError(f'--results {path}: no such file; timm-amf evaluate RUN --results-file FILE writes one')
    try:
        results = [_evaluated_row(row) for row in _rows(path) if _together(row) or Path(row['run']).name == run]
    except (KeyError, ValueError, TypeError) as e:
        raise UserError(
            f'--results {path}: is not of timm-amf evaluate --results-file ({type(e).__name__}: {e})') from None
    if not results:
        raise UserError(f'--results {path}: has no row of {run}; evaluate the run that is published')
    return results


def _together(row: Mapping[str, str]) -> bool:
    return row['run'].startswith(('mean of ', 'ensemble of '))


def _evaluated_row(row: Mapping[str, str]) -> Result:
    how = 'ten crops' if row['crops'] == '10' else 'one crop'
    values = [float(row[key]) for key in ('top1', 'top1_low', 'top1_high', 'top5')]
    runs = row['run'] if _together(row) else ''
    return Result(row['component'], row['split'] or 'val', int(row['images']), *values, how, runs)


# -- the files --------------------------------------------------------------------------------------------------------


def is_own_file(path: str) -> bool:
    """Whether a file of a repository is one that publishing writes, and so may remove when it writes it no more."""
    return path in _FILES or (path.startswith('figures/') and path.endswith(_FIGURES))


def stage(run: OpenRun, folder: Path, card: str, license: str) -> list[Path]:
    """Writes what is published into an empty folder, and checks it.

    Args:
        run: What is published.
        folder: Where to.
        card: Text of the README.
        license: Licence of the weights.

    Returns:
        The files, in the order in which they are listed.

    Raises:
        UserError: If the model does not come back from the folder as it is, or a secret is in it.
    """
    save_weights(run.model, folder / WEIGHTS)
    _write_config(run, folder / 'config.json', license)
    _dump(folder / 'plan.yaml', {'plan': run.plan.to_dict()})
    _dump(folder / 'args.yaml', _public_args(run))
    for name in ('summary.csv', 'policy.csv'):
        if (run.folder / name).exists():
            shutil.copyfile(run.folder / name, folder / name)
    write_text(folder / 'metrics.json', json.dumps(_metrics(run), indent=2) + '\n')
    for source, name in figures(run.folder):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source, folder / name)
    write_text(folder / 'README.md', card)
    _check_secrets(folder)
    _check_loads(run, folder)
    rank = {name: i for i, name in enumerate(_FILES)}
    files = sorted(p for p in folder.rglob('*') if p.is_file())
    return sorted(files, key=lambda p: (rank.get(p.name, len(rank)), p.as_posix()))


def figures(run: Path) -> list[tuple[Path, str]]:
    """The figures of a run's report, with the name that each has in the repository."""
    found = sorted(p for p in (run / 'report').rglob('*') if p.suffix in _FIGURES)
    return [(path, 'figures/' + '-'.join(path.relative_to(run / 'report').parts)) for path in found]


class _PlainDumper(yaml.SafeDumper):
    """Writes equal values out, for aliases are not read from a repository."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _dump(path: Path, content: Mapping) -> None:
    write_text(path, yaml.dump(content, Dumper=_PlainDumper, sort_keys=False, allow_unicode=True))


def _write_config(run: OpenRun, path: Path, license: str) -> None:
    model = run.model
    data_config = resolve_data_config(vars(run.args), model=run.trained, verbose=False)
    if run.compacted:
        args = {k: v for k, v in run.trained.backbone_part.kwargs.items() if not k.startswith('pretrained_cfg')}
        args = {**getattr(model, '_model_args', {}), **args}
    else:
        args = dict(getattr(model, '_model_args', {}))
    args = {k: _without_sources(v) for k, v in args.items() if not k.startswith('pretrained_cfg')}
    # Tag and licence are not those of the weights that it started from.
    own = {'tag': None, 'license': license}
    # A head with more outputs than the data have classes has names for the first ones alone.
    names = {'label_names': run.train.class_names} if model.num_classes == run.train.num_classes else {}
    try:
        save_config_for_hf(
            model,
            str(path),
            model_config={**names, 'pretrained_cfg': own, 'timm_amf': _provenance(run)},
            model_args=args,
            data_config={k: v for k, v in data_config.items() if k in _DATA_KEYS},
        )
    except (ValueError, TypeError) as e:
        raise UserError(f'{run.folder}: its arguments cannot be written as JSON ({" ".join(str(e).split())})') from None


def _without_sources(value: Any) -> Any:
    """Arguments without the sources of weights, at any depth."""
    if isinstance(value, Mapping):
        return {k: _without_sources(v) for k, v in value.items() if k not in _SOURCES}
    if isinstance(value, (list, tuple)):
        return [_without_sources(v) for v in value]
    return value


def fixed_paths(model: nn.Module, plan: Optional[Plan], eval_blocks: Optional[str]) -> Optional[Union[str, list]]:
    """What a SpotTune's `set_blocks` takes so that it computes what its run evaluated; None where the policy decides.

    Args:
        model: Any model.
        plan: Its Plan, whose `global_k` counts after `eval_blocks`.
        eval_blocks: `tuned`, `frozen`, or blocks with commas between.
    """
    return method_of(model).fixed_path(None if plan is None else plan.global_k, eval_blocks)


def _provenance(run: OpenRun) -> dict[str, Any]:
    """What `config.json` says of where the weights come from."""
    components = []
    for i, component in enumerate(run.spec.components):
        # Of several components with the same labels each has all of them.
        own = {int(t) for t in run.train.targets[run.train.component_of == i]}
        components.append(dict(
            name=component.name,
            dataset=_without_folders(component.dataset),
            classes=len(own),
            train=int((run.train.component_of == i).sum()),
            val=int((run.val.component_of == i).sum()),
        ))
    blocks = fixed_paths(run.model, run.plan, run.args.eval_blocks)
    return dict(
        version=__version__,
        trained=get_arch_name(run.trained.pretrained_cfg['architecture']),
        data=components,
        splits=list(splits_from_args(run.args)),
        epoch=run.epoch,
        **({'blocks': blocks} if blocks is not None else {}),
    )


def _public_args(run: OpenRun) -> dict[str, Any]:
    """The options of the run without folders, secrets and what is of the occasion; `--config` takes them."""
    content = yaml.safe_load((run.folder / 'args.yaml').read_text(encoding='utf-8'))
    content = {k: _without_folders(v) for k, v in content.items() if k not in _PRIVATE}
    content['plan'] = run.plan.to_dict()  # also where the run had it from a file
    explicit = [name for name in content.get('explicit', ()) if name not in (*_PRIVATE, 'plan')]
    content['explicit'] = explicit
    return content


def _without_folders(value: Any) -> Any:
    """Paths of this machine shortened to their last part, and what looks like a token taken out."""
    if isinstance(value, Mapping):
        return {k: _without_folders(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_folders(v) for v in value]
    if not isinstance(value, str):
        return value
    if _WHOLE_FOLDER.match(value):  # also with spaces and commas in it
        value = re.split(r'[/\\]', value.rstrip('/\\'))[-1]
    return _TOKEN.sub('***', _FOLDER.sub(lambda m: m['before'] + m['name'], value))


def _metrics(run: OpenRun) -> dict[str, Any]:
    """The results, and the row of `summary.csv` that the weights are of."""
    row = next((r for r in _rows(run.folder / 'summary.csv') if r['epoch'] == str(run.epoch)), {})
    return dict(
        epoch=run.epoch,
        eval_metric=run.args.eval_metric,
        summary={k: float(v) for k, v in row.items() if v and k != 'epoch'},
        confidence=0.95,
        results=[vars(result) for result in run.results],
    )


# -- checks -----------------------------------------------------------------------------------------------------------


def _check_secrets(folder: Path) -> None:
    """Refuses files in which a token of the Hub is; the last check, after what is known was taken out."""
    token = get_token()
    for path in folder.rglob('*'):
        if path.suffix in ('.md', '.json', '.yaml', '.csv', '.svg'):
            text = path.read_text(encoding='utf-8')
            if (token and token in text) or _TOKEN.search(text):
                raise UserError(
                    f'{path.name}: holds an access token of the Hub; take it out of the run and revoke it')


@torch.no_grad()
def _check_loads(run: OpenRun, folder: Path) -> None:
    """Loads the folder as others will, and compares what both models compute."""
    where = str(run.folder)
    config = read_checked(folder / 'config.json', where)
    check_fits(config, folder / WEIGHTS, where)
    back = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    size = config['pretrained_cfg']['input_size']
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    ours, theirs = run.model(images), back(images)
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5, equal_nan=True):
        raise UserError(
            f'{run.folder}: the model does not come back from its config.json (logits differ); an option that no '
            f'argument of the model expresses, such as --bn-eps or --split-bn, cannot be published')
