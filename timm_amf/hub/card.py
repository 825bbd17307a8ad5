"""The model card: metadata that the Hub reads, and what somebody needs who has never heard of the run."""
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from timm_amf.engine.recipe_schema import describe_expected
from timm_amf.errors import UserError
from timm_amf.hub.stage import OpenRun, Result, figures, fixed_paths
from timm_amf.hub.words import describe_plan, join_words
from timm_amf.models.method import Method, method_of
from timm_amf.models.tags import OWNER
from timm_amf.tuning.plan import RolePlan

__all__ = ['CardOptions', 'build_card']

_CITATIONS = {
    'amf': """@article{shen2022amf,
  title={{AMF}: Adaptable Weighting Fusion with Multiple Fine-tuning for Image Classification},
  author={Shen, Xuyang and Plested, Jo and Caldwell, Sabrina and Zhong, Yiran and Gedeon, Tom},
  year={2022}
}""",
    'multitune': """@inproceedings{wang2020multitune,
  title={{MultiTune}: Adaptive Integration of Multiple Fine-Tuning Models for Image Classification},
  author={Wang, Y. and Plested, J. and Gedeon, T.},
  booktitle={International Conference on Neural Information Processing (ICONIP)},
  pages={488--496},
  year={2020}
}""",
    'spottune': """@inproceedings{guo2019spottune,
  title={{SpotTune}: Transfer Learning through Adaptive Fine-tuning},
  author={Guo, Yunhui and Shi, Honghui and Kumar, Abhishek and Grauman, Kristen and Rosing, Tajana and Feris, Rogerio},
  booktitle={Conference on Computer Vision and Pattern Recognition (CVPR)},
  year={2019}
}""",
    'nonbinary': """@article{plested2021rethinking,
  title={Rethinking Binary Hyperparameters for Deep Transfer Learning for Image Classification},
  author={Plested, Jo and Shen, Xuyang and Gedeon, Tom},
  journal={arXiv preprint arXiv:2107.08585},
  year={2021}
}""",
    'blockwise': """@misc{barakat2023blockwise,
  title={Improving Reliability of Fine-tuning with Block-wise Optimisation},
  author={Barakat and Huang},
  year={2023}
}""",
}


@dataclass(frozen=True)
class CardOptions:
    """What only the publisher knows.

    Args:
        license: Licence of the weights, as the Hub names it (`apache-2.0`, `cc-by-nc-4.0`, `other`, ...).
        license_name: Name of a licence that is `other`.
        license_link: Where it is.
        base_models: Hub ids of the models that the run started from; None finds them in the run.
        datasets: Hub ids or names of the data; None takes the names of the components.
    """
    license: str
    license_name: Optional[str] = None
    license_link: Optional[str] = None
    base_models: Optional[Sequence[str]] = None
    datasets: Optional[Sequence[str]] = None

    def __post_init__(self):
        if not re.fullmatch(r'[a-z0-9][a-z0-9.+-]*', self.license or ''):
            raise UserError(
                f"--license: {self.license or 'is missing'}; name the licence of the weights as the Hub does, such as "
                'apache-2.0, mit, cc-by-4.0, or other')
        if self.license == 'other' and not (self.license_name and self.license_link):
            raise UserError('--license other: say which with --license-name and --license-link')


def build_card(run: OpenRun, repo_id: str, options: CardOptions) -> str:
    """The README of a published run, metadata first.

    Args:
        run: The run.
        repo_id: Where it is published.
        options: What the run does not know.
    """
    plain = not isinstance(run.model, Method)
    bases = _base_models(run) if options.base_models is None else list(options.base_models)
    if options.base_models is None and not bases:
        bases = _of_recipe(run, 'base_model')
    datasets = options.datasets or _of_recipe(run, 'datasets') or _dataset_names(run)
    name = repo_id.split('/')[-1]
    data = ModelCardData(
        license=options.license,
        license_name=options.license_name,
        license_link=options.license_link,
        library_name='timm' if run.compacted else 'timm_amf',
        pipeline_tag='image-classification',
        tags=_tags(run),
        base_model=bases or None,
        datasets=list(datasets),
        metrics=['accuracy'],
        model_name=name,
        eval_results=[r for x in run.results if not x.runs for r in _eval_results(x, datasets, run)] or None,
    )
    if not run.results:
        data.model_name = None  # an index of no results is none
    text = '\n\n'.join(filter(None, [
        f'# {name}',
        _summary(run),
        f'## Use\n\n{_usage(run, repo_id, plain)}',
        f'## Results\n\n{_results(run)}',
        f'## How it was fine-tuned\n\n{_training(run, repo_id, bases)}',
        _figures(run),
        f'## Limits\n\n{_limits(run, bases)}',
        f'## Citation\n\n{_citation(run)}',
    ]))
    return str(ModelCard(f'---\n{data.to_yaml()}\n---\n\n{text}\n'))


# -- metadata ---------------------------------------------------------------------------------------------------------


def _of_recipe(run: OpenRun, key: str) -> list[str]:
    """What the section `card` of the run's recipe names; in a file of one's own it may be a name instead of a list."""
    value: Any = (run.args.recipe.get('card') or {}).get(key) or []
    return [str(item) for item in (value if isinstance(value, list) else [value])]


def _base_models(run: OpenRun) -> list[str]:
    """Hub ids of the weights that the run started from, as far as they came from the Hub.

    A repository of the whole model, named as such or by a fine-tuned tag, is one; else each network has its own.
    """
    if not run.own.get('pretrained') or run.own.get('pretrained_path') or run.own.get('initial_checkpoint'):
        return []
    whole = run.trained.pretrained_cfg
    of_whole = str(run.args.model).startswith(('hf-hub:', 'hf_hub:'))
    if of_whole or (whole.get('hf_hub_id') or '').startswith(f'{OWNER}/'):
        cfgs = [whole]
    else:
        cfgs = [net.pretrained_cfg for net in method_of(run.trained).networks()]
    ids = [cfg['hf_hub_id'].split('@')[0] for cfg in cfgs if cfg.get('hf_hub_id') and not cfg.get('file')]
    return list(dict.fromkeys(ids))


def _dataset_names(run: OpenRun) -> list[str]:
    """Names of the datasets: of those on the Hub their id, else of the dataset or the component."""
    names = []
    for component in run.spec.components:
        dataset = component.dataset
        on_hub = re.fullmatch(r'hfds/([\w.-]+/[\w.-]+)', dataset)
        own = re.fullmatch(r'\w+/([\w.-]+)', dataset)
        names.append(on_hub[1] if on_hub else own[1] if own else component.name)
    return list(dict.fromkeys(names))


def _tags(run: OpenRun) -> list[str]:
    """What the card is found by: the kind of model, and what the recipe adds."""
    method = method_of(run.trained).method_name
    tags = ['image-classification', 'timm', *([] if run.compacted else ['timm_amf']), 'fine-tuning']
    tags += [*([method] if method else []), *_of_recipe(run, 'tags')]
    return list(dict.fromkeys(tags))


def _eval_results(result: Result, datasets: Sequence[str], run: OpenRun) -> list[EvalResult]:
    name = result.data or ' + '.join(run.val.components)
    where = run.val.components.index(result.data) if result.data in run.val.components else 0
    per_component = len(datasets) == len(run.val.components)
    kind = datasets[where] if per_component and (result.data or len(datasets) == 1) else 'mixture'
    # What agrees in type, config and split comes under one name, the first's: so parts of a mixture differ in their
    # config, and how an accuracy was evaluated goes with the accuracy.
    common = dict(
        task_type='image-classification', task_name='Image Classification', dataset_type=kind, dataset_name=name,
        dataset_config=result.data if kind == 'mixture' and result.data else None, dataset_split=result.split)
    values = [('top-1', result.top1), ('top-5', result.top5)]
    return [
        EvalResult(
            **common, metric_type='accuracy', metric_name=f'{title} accuracy, percent ({result.how})',
            metric_value=round(value, 4))
        for title, value in values if value is not None
    ]


# -- text -------------------------------------------------------------------------------------------------------------


def _summary(run: OpenRun) -> str:
    parts = ', '.join(
        f'{component.name} ({len(set(run.train.targets[run.train.component_of == i]))} classes, '
        f'{(run.train.component_of == i).sum()} training images)'
        for i, component in enumerate(run.spec.components))
    size = 'x'.join(map(str, _input_size(run)))
    millions = sum(p.numel() for p in run.model.parameters()) / 1e6
    return (
        f'{_what(run)}\n\n- data: {parts}\n- classes: {run.model.num_classes}; their names are in `config.json`\n'
        f'- input: {size}, parameters: {millions:.2f} M')


def _what(run: OpenRun) -> str:
    method = method_of(run.trained)
    name = method.architectures()[0]
    if run.compacted:
        return (
            f'{name}, fine-tuned with SpotTune under a global policy (k = {run.plan.global_k}): the same blocks '
            f'are tuned for all images, the others are as they were. What is left is a plain timm model.')
    if not method.method_name and any(isinstance(role.train, list) for role in run.plan.roles.values()):
        return f'{name}, fine-tuned in a part of its layers.'
    return method.sentence()


def _input_size(run: OpenRun) -> Sequence[int]:
    from timm.data import resolve_data_config

    return resolve_data_config(vars(run.args), model=run.trained, verbose=False)['input_size']


def _usage(run: OpenRun, repo_id: str, plain: bool) -> str:
    channels, height, width = _input_size(run)
    mode = 'L' if channels == 1 else 'RGB'
    lines = ['import timm', 'import torch', 'from PIL import Image']
    if not plain:
        lines.insert(1, 'import timm_amf  # registers the model with timm')
    lines += ['', f"model = timm.create_model('hf-hub:{repo_id}', pretrained=True).eval()"]
    blocks = fixed_paths(run.model, run.plan, run.args.eval_blocks)
    if blocks is not None:
        lines.append(f'model.set_blocks({blocks!r})  # the path of all images that the results are of')
    lines += [
        'config = timm.data.resolve_model_data_config(model)',
        'transform = timm.data.create_transform(**config, is_training=False)',
        '',
        f"image = Image.new('{mode}', ({width}, {height}))  # yours: Image.open('photo.jpg').convert('{mode}')",
        'with torch.no_grad():',
        '    probabilities = model(transform(image)[None]).softmax(1)[0]',
        f'values, indices = probabilities.topk({min(5, run.model.num_classes)})',
        'for value, index in zip(values.tolist(), indices.tolist()):',
    ]
    named = run.model.num_classes == run.train.num_classes
    label = "model.pretrained_cfg['label_names'][index]" if named else 'index'
    lines.append(f"    print(f'{{value:.1%}}', {label})")
    install = 'pip install timm' if plain else 'pip install timm_amf'
    text = f'```bash\n{install}\n```\n\n```python\n' + '\n'.join(lines) + '\n```'
    note = method_of(run.model).usage_note()
    text += f'\n\n{note}' if note else ''
    easy = f"`timm_amf.load('{repo_id}')` does the same, checks all that it reads, and knows the Plan and the data " \
           'that made the weights (`model.provenance`).'
    return f'{text}\n\n{easy if not plain else ""}'.rstrip()


def _results(run: OpenRun) -> str:
    if not run.results:
        return 'No results were recorded.'
    lines = ['| data | split | images | top-1 | 95 % interval | top-5 | how |', '|---|---|---|---|---|---|---|']
    for r in run.results:
        top5 = '' if r.top5 is None else f'{r.top5:.2f}'
        how = f'{r.how}, {r.runs}' if r.runs else r.how
        lines.append(
            f'| {r.data or "all"} | {r.split} | {r.images} | {r.top1:.2f} | {r.low:.2f} to {r.high:.2f} | {top5} | '
            f'{how} |')
    text = '\n'.join(lines)
    of_mean = ", of a mean Student's t over the runs" if any(r.runs.startswith('mean of') for r in run.results) else ''
    text += (
        f"\n\nIntervals: Wilson's over the images{of_mean}. The epoch was chosen by `{run.args.eval_metric}` on the "
        f'`{run.results[-1].split}` split, so figures of that split are a little too good.')
    expected = _expected(run)
    return f'{text}\n\n{expected}' if expected else text


def _expected(run: OpenRun) -> str:
    """What the run's recipe expects; of a file of one's own, which may say anything, what are figures as in recipes."""
    section = run.args.recipe.get('expected') or {}
    found = describe_expected({key: value for key, value in section.items() if _is_range(value)})
    if not found or not section.get('source'):
        return ''
    split = f' on the `{section["split"]}` split' if section.get('split') else ''
    return f'The recipe expects{split} (percent, top-1 unless another is named): {found}; source: {section["source"]}.'


def _is_range(value: Any) -> bool:
    """Whether it is `{mean: 93, std: 0.2}` or `{min: 96, max: 98}`."""
    return (
        isinstance(value, Mapping) and all(isinstance(number, (int, float)) for number in value.values())
        and ('mean' in value or {'min', 'max'} <= set(value)))


def _training(run: OpenRun, repo_id: str, bases: Sequence[str]) -> str:
    plan = '\n'.join(f'- {line}' for line in describe_plan(run.plan, run.trained))
    command = f'hf download {repo_id} args.yaml --local-dir run\ntimm-amf train --config run/args.yaml'
    if run.own.get('data_dir'):
        command += ' --data-dir DATA'
    note = '' if run.own.get('data_dir') else '; folders in it are shortened to their last part, put yours there'
    return (
        f'{_start(run, bases)}\n\n{plan}\n\n`plan.yaml` has every field, `args.yaml` every option{note}. The same '
        f'training again:\n\n```bash\n{command}\n```')


def _start(run: OpenRun, bases: Sequence[str]) -> str:
    """What the weights were before."""
    file = run.own.get('initial_checkpoint') or run.own.get('pretrained_path')
    if bases:
        return f'It started from {join_words([f"`{base}`" for base in bases])}.'
    if file:
        return f'It started from a file, `{Path(file).name}`.'
    if run.own.get('pretrained'):
        return 'It started from pretrained weights that are not on the Hub.'
    return 'It started from random weights.'


def _figures(run: OpenRun) -> str:
    found = [name for _, name in figures(run.folder)]
    if not found:
        return ''
    return '## Figures\n\n' + '\n\n'.join(f'![{name[8:].rpartition(".")[0]}]({name})' for name in found)


def _limits(run: OpenRun, bases: Sequence[str]) -> str:
    limits = [
        f'It knows {run.model.num_classes} classes and puts every image into one of them; what it says of other kinds '
        'of images means nothing, and its probabilities are not calibrated.',
        'It was evaluated on images of the same source as those it was trained on; elsewhere it will be less accurate.',
    ]
    if bases:
        limits.append(f'It inherits what its base models learnt, and their licences: {", ".join(bases)}.')
    return '\n'.join(f'- {line}' for line in limits)


def _citation(run: OpenRun) -> str:
    own = method_of(run.trained).citation
    entries = [_CITATIONS[key] for key in _papers(run) if key in _CITATIONS] + ([own] if own else [])
    return '\n\n'.join(f'```bibtex\n{entry}\n```' for entry in entries)


def _papers(run: OpenRun) -> list[str]:
    """Whose method the run is: the model's, the recipe's paper, and what the Plan does."""
    method = method_of(run.trained).method_name
    papers = [method] if method else []
    if method == 'multitune':
        papers.insert(0, 'amf')  # whose re-implementation of it this is
    named = [paper for paper in _of_recipe(run, 'paper') if paper in _CITATIONS]
    papers += named
    roles = run.plan.roles.values()
    if not named and any(_names_layers(role) for role in roles):
        papers.append('blockwise')
    if not papers or any(role.reinit_blocks or role.l2sp_alpha or role.low_blocks for role in roles):
        papers.append('nonbinary')
    return list(dict.fromkeys(papers))


def _names_layers(role: RolePlan) -> bool:
    """Whether parts of a network train that are named, as `timm-amf search` names them, not counted."""
    return isinstance(role.train, list) and any(isinstance(item, str) for item in role.train)
