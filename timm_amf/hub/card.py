"""What the template of the model card, `card.md`, is filled with; its text is there."""
import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from timm_amf.engine.recipes import PAPERS, describe_expected
from timm_amf.models.method import Method, method_of
from timm_amf.models.tags import OWNER
from timm_amf.tuning import Plan
from timm_amf.tuning.resolve import resolve

if TYPE_CHECKING:
    from timm_amf.hub.publish import Publication, Result

__all__ = ['build_card']


def build_card(
        what: 'Publication',
        repo_id: str,
        license: str,
        license_name: Optional[str] = None,
        license_link: Optional[str] = None,
        base_models: Optional[Sequence[str]] = None,
        datasets: Optional[Sequence[str]] = None,
) -> str:
    """The README of a published run, metadata first; the arguments are those of `publish`."""
    run, model, method = what.run, what.model, method_of(what.trained)
    bases = list(base_models) if base_models is not None else _base_models(what) or _of_recipe(what, 'base_model')
    datasets = list(datasets or _of_recipe(what, 'datasets') or _dataset_names(what))
    name = repo_id.split('/')[-1]
    plain = not isinstance(model, Method)
    data = ModelCardData(
        license=license,
        license_name=license_name,
        license_link=license_link,
        library_name='timm' if plain else 'timm_amf',
        pipeline_tag='image-classification',
        tags=list(dict.fromkeys(filter(None, [
            'image-classification', 'timm', 'timm_amf', 'fine-tuning', method.method_name,
            *_of_recipe(what, 'tags')]))),
        base_model=bases or None,
        datasets=datasets,
        metrics=['accuracy'],
        # An index of no results is none.
        model_name=name if what.results else None,
        eval_results=[r for x in what.results if not x.runs for r in _eval_results(x, datasets, what)] or None,
    )
    module = type(model).__module__
    card = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name('card.md')),
        name=name,
        repo_id=repo_id,
        what=what,
        run=run,
        model=model,
        method=method,
        sentence=_sentence(what),
        named=model.num_classes == len(run.names),
        millions=sum(p.numel() for p in model.parameters()) / 1e6,
        plain=plain,
        module='timm_amf' if module.startswith('timm_amf.') else module,
        usage_note=method_of(model).usage_note(),
        expected=_expected(what),
        bases=bases,
        plan=_plan_text(run.plan, what.trained),
        papers=_papers(what),
    )
    # The template leaves blank lines where it leaves something out.
    return re.sub(r'\n{3,}', '\n\n', str(card)).rstrip() + '\n'


def _of_recipe(what: 'Publication', key: str) -> list[str]:
    """What the section `card` of the run's recipe names; in a file of one's own it may be a name instead of a list."""
    value: Any = (what.run.args.recipe.get('card') or {}).get(key) or []
    return [str(item) for item in (value if isinstance(value, list) else [value])]


def _base_models(what: 'Publication') -> list[str]:
    """Hub ids of the weights that the run started from, as far as they came from the Hub.

    A repository of the whole model, named as such or by a fine-tuned tag, is one; else each network has its own.
    """
    options, model = what.run.options, what.trained
    if not options.get('pretrained') or options.get('pretrained_path') or options.get('initial_checkpoint'):
        return []
    whole = model.pretrained_cfg
    of_whole = str(what.run.args.model).startswith(('hf-hub:', 'hf_hub:')) or (
        whole.get('hf_hub_id') or '').startswith(f'{OWNER}/')
    cfgs = [whole] if of_whole else [net.pretrained_cfg for net in method_of(model).networks()]
    ids = [cfg['hf_hub_id'].split('@')[0] for cfg in cfgs if cfg.get('hf_hub_id') and not cfg.get('file')]
    return list(dict.fromkeys(ids))


def _dataset_names(what: 'Publication') -> list[str]:
    """Names of the datasets: of those on the Hub their id, else of the dataset or the component."""
    names = []
    for component in what.spec.components:
        found = re.fullmatch(r'hfds/([\w.-]+/[\w.-]+)|\w+/([\w.-]+)', component.dataset)
        names.append((found[1] or found[2]) if found else component.name)
    return list(dict.fromkeys(names))


def _eval_results(result: 'Result', datasets: Sequence[str], what: 'Publication') -> list[EvalResult]:
    components = what.run.data[1].components
    where = components.index(result.data) if result.data in components else 0
    per_component = len(datasets) == len(components)
    kind = datasets[where] if per_component and (result.data or len(datasets) == 1) else 'mixture'
    # In the Hub's unit, a share. What agrees in type, config and split comes under one name, the first's: so parts of
    # a mixture differ in their config, and how an accuracy was evaluated goes with the accuracy.
    common = dict(
        task_type='image-classification', task_name='Image Classification', dataset_type=kind,
        dataset_name=result.data or ' + '.join(components), metric_type='accuracy',
        dataset_config=result.data if kind == 'mixture' and result.data else None, dataset_split=result.split)
    return [
        EvalResult(
            **common, metric_name=f'{title} ({result.how})', metric_value=round(value / 100, 6))
        for title, value in (('Accuracy', result.top1), ('Top-5 accuracy', result.top5)) if value is not None
    ]


def _sentence(what: 'Publication') -> str:
    """What the model is."""
    run, method = what.run, method_of(what.trained)
    name = method.architectures()[0]
    if what.model is not what.trained:
        return (
            f'{name}, fine-tuned with SpotTune under a global policy (k = {run.plan.global_k}): the same blocks '
            'are tuned for all images, the others are as they were. What is left is a plain timm model.')
    if not method.method_name and any(isinstance(role.train, list) for role in run.plan.roles.values()):
        return f'{name}, fine-tuned in a part of its layers.'
    return method.sentence()


def _expected(what: 'Publication') -> Mapping[str, str]:
    """What the run's recipe expects; of a file of one's own, which may say anything, what are figures as in recipes."""
    section = what.run.args.recipe.get('expected') or {}
    figures = {
        key: value for key, value in section.items()
        if isinstance(value, Mapping) and ('mean' in value or {'min', 'max'} <= set(value))
        and all(isinstance(number, (int, float)) for number in value.values())}
    return dict(figures=describe_expected(figures), source=section.get('source'), split=section.get('split'))


def _plan_text(plan: Plan, model: Any) -> str:
    """The Plan's common settings and those of each role, written as in `plan.yaml`; defaults are left out."""
    values, default = plan.to_dict(), Plan().to_dict()
    shape = {'sched', 'decay_epochs', 'decay_rate'} if plan.schedule.sched == 'step' else {'sched'}
    common = _differing(values, default, {'epochs', 'opt'})
    neutral, roles = dataclasses.asdict(Plan().role('')), {}
    for name, resolved in resolve(model, plan).roles.items():
        role = resolved.plan
        kept = {'lr', 'weight_decay', *(['low_lr_scale'] if role.low_blocks else [])}
        frozen = role.train in ('none', [])
        roles[name] = dict(train='none') if frozen else _differing(dataclasses.asdict(role), neutral, kept)
    text = {
        **{k: v for k, v in common.items() if k not in ('lr', 'weight_decay')},  # each role has its own
        'schedule': _differing(values['schedule'], default['schedule'], shape),
        'roles': roles,
    }
    return yaml.safe_dump(text, sort_keys=False, default_flow_style=None, width=120)


def _differing(values: Mapping[str, Any], default: Mapping[str, Any], kept: set[str]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if k in kept or v != default.get(k)}


def _papers(what: 'Publication') -> set[str]:
    """Whose method the run is: the model's, the recipe's paper, and what the Plan does."""
    method, named = method_of(what.trained).method_name, {*_of_recipe(what, 'paper')} & {*PAPERS}
    roles = what.run.plan.roles.values()
    papers = named | {method} - {''}
    if method == 'multitune':
        papers.add('amf')  # its paper re-implements MultiTune
    if not named and any(isinstance(r.train, list) and any(isinstance(part, str) for part in r.train) for r in roles):
        papers.add('blockwise')  # layers by name, as `timm-amf search` writes them
    if any(role.reinit_blocks or role.l2sp_alpha or role.low_blocks for role in roles) or not papers:
        papers.add('nonbinary')
    return papers
