"""`timm-amf advise`: measure how well pretrained weights fit the data, and propose a Plan.

What to re-initialise, to slow down and to hold near its start is proposed by the paper's Table 7, from measures of
features. Which LR, and whether these settings are of use at all, is measured by pilots: short trainings of each
component by itself, with a schedule of their own, from the start that `timm-amf fit` has.

    timm-amf advise DIR --model resnet50
    timm-amf advise --config amf.yaml --random-init 30 --advice-file plan.yaml
    timm-amf advise DIR --models resnet50,convnext_tiny,vit_small_patch16_224
    timm-amf train --config advice.yaml

It takes the flags of train_amf.py, so the advice is for the run that these name.
"""
import argparse
import functools
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
from accelerate import Accelerator
from scipy.stats import rankdata

from timm_amf.data import DataSpec, Mixture, create_dataset, data_spec_from_args
from timm_amf.engine import build
from timm_amf.engine.options import keyword_words, parse_args
from timm_amf.errors import Diverged, Interrupted, UserError
from timm_amf.files import replacing
from timm_amf.flags import words_of
from timm_amf.parsers import PARSERS
from timm_amf.search.features import FeatureNet, Features, extract_features
from timm_amf.search.fit import COMMON, complete, run
from timm_amf.search.proposal import (
    RELIABILITY,
    RULES,
    Decision,
    body_settings,
    decide,
    is_sgd,
    plan_flags,
    propose,
    read_target,
    sureness,
    with_defaults,
    without_advised,
)
from timm_amf.search.transferability import LABELS, RANKING, Measures, class_means, measure
from timm_amf.text import columns, read_rows
from timm_amf.tuning import Plan, Schedule, plan_from_args
from timm_amf.tuning.plan_args import common_plan, resolve_lr

__all__ = ['Advice', 'ComponentAdvice', 'advise', 'main']

_RANDOM_LR = 0.05  # of SGD, at batch 32: far enough from bad for every network with batch norm
_ADAM_LR, _SGD_LR = 1e-3, 0.02  # the highest of the pilots' three; that of SGD at batch 32
_ROLES = ('backbone', 'head')  # of a plain model
_OPTIMIZER = ('opt', 'momentum', 'weight_decay', 'opt_eps', 'opt_betas', 'opt_kwargs')
# Options that do not count in a short training, besides those of the Plan, which it is given; and of one that starts
# from random weights.
_NOT_OF_A_PILOT = (
    'component', 'data_preset', 'data_dir', 'dataset', 'lr', 'lr_base', 'lr_base_size', 'lr_base_scale', 'warmup_lr',
    'min_lr', 'resume', 'eval_only', 'dry_run', 'start_epoch', 'stop_epoch', 'early_stop', 'checkpoint_hist',
    'save_epochs', 'wise_ft', 'report', 'publish', 'budget', 'branch_loss', 'policy_balance', 'routing_eps')
_START = ('pretrained', 'pretrained_path', 'initial_checkpoint', 'num_classes', 'head_start')


@dataclass
class Pilot:
    """A short training.

    Attributes:
        lr: Its LR.
        by_rules: With the settings of Table 7, or with none.
        top1: Validation accuracy in percent; None where it was not trained.
        loss: Validation loss.
    """
    lr: float
    by_rules: bool
    top1: Optional[float] = None
    loss: Optional[float] = None

    def __str__(self) -> str:
        return f'LR {self.lr:g}, {"" if self.by_rules else "without "}the settings of Table 7: {self.top1:.2f}'


@dataclass
class ComponentAdvice:
    """What is known of one component of the data under one network.

    Attributes:
        name: The component.
        network: The network.
        measures: What was measured.
        decision: The side of Table 7 that it is on.
        settings: Settings of the network's role, besides the LR.
        pilots: What was tried, the best first; where nothing was, the LR that is taken.
    """
    name: str
    network: str
    measures: Measures
    decision: Decision
    settings: dict[str, Any]
    pilots: list[Pilot]

    @property
    def lr(self) -> float:
        """The LR that is proposed."""
        return self.pilots[0].lr


@dataclass
class Advice:
    """What `advise` found.

    Attributes:
        model: The model that the Plan is for.
        plan: The Plan.
        config: The whole YAML file that `train_amf.py --config` runs.
        notes: What the Plan leaves open, in sentences.
        roles: For each body of the model, whose advice it follows.
        components: Of each component of the data, under each distinct network of the model.
        ranking: With several models: mean rank of each, and its measures, the best first.
    """
    model: str
    plan: Plan
    config: str
    notes: list[str]
    roles: dict[str, ComponentAdvice]
    components: list[ComponentAdvice]
    ranking: list[tuple[str, float, dict[str, float]]]

    @property
    def measures(self) -> dict[str, dict[str, float]]:
        """Component -> measure -> value, under the first network."""
        return {c.name: c.measures.values for c in self.components if c.network == self.components[0].network}

    def __str__(self) -> str:
        ranking = [_ranking_table(self.ranking)] if self.ranking else []
        return '\n\n'.join([*ranking, *map(_component_table, self.components), _plan_table(self), *self.notes])

    def to_yaml(self, path: Union[str, Path]) -> None:
        """Write the file for `train_amf.py --config`, whole or not at all."""
        with replacing(path, 'choose another --advice-file') as temporary:
            temporary.write_text(self.config, encoding='utf-8')


def _advise(own: argparse.Namespace, runs: Sequence[argparse.Namespace], progress: bool = True) -> Advice:
    """Advice for the flags of `advise`, and of train_amf.py: of one run, or one for each of `--models`."""
    runs = [argparse.Namespace(**{**vars(args), 'tracker': ['none'], 'log_wandb': False}) for args in runs]
    accelerator = build.build_accelerator(runs[0])
    if accelerator.num_processes > 1:
        raise UserError('advise runs in one process; start it without accelerate launch or torchrun')
    data = build.build_data(runs[0], accelerator)
    found = {}
    for args in runs:
        (roles, blocks, networks), done, advices = read_target(args, data[0].num_classes), {}, []
        for plain, number in zip(networks, blocks.values()):
            key = repr((plain.model, plain.model_kwargs, plain.pretrained_cfg_overlay, plain.pretrained_path))
            if key not in done:  # equal networks are measured once
                done[key] = _measure_network(plain, number, own, data, accelerator, progress and not args.no_progress)
            advices.append(done[key])
        found[args.model] = args, roles, blocks, advices
    ranking = _rank([(name, advices[0]) for name, (*_, advices) in found.items()]) if len(runs) > 1 else []
    best = found[ranking[0][0] if ranking else runs[0].model]
    every = [c for *_, advices in found.values() for network in advices for c in network]
    components = list({(c.network, c.name): c for c in every}.values())
    return Advice(*propose(*best, data[0].num_classes, own.policy), components, ranking)


def _measure_network(
        args: argparse.Namespace,
        blocks: int,
        own: argparse.Namespace,
        data: tuple[Mixture, Mixture],
        accelerator: Accelerator,
        progress: bool,
) -> list[ComponentAdvice]:
    """The advice for each component under the plain network of the options, which has so many blocks."""
    net = FeatureNet(args, accelerator, classifier=not own.no_source_classifier)

    def features(dataset: Mixture, of: str) -> Features:
        return extract_features(net, dataset, args.cache_dir, progress, f'{net.name}: {of} features')

    splits, source = [features(dataset, of) for dataset, of in zip(data, ('train', 'val'))], None
    if own.source_dir:
        spec = DataSpec.from_mapping({'path': own.source_dir, 'name': 'source'})
        images = features(create_dataset(spec, 'train', in_chans=build.input_channels(args)), 'source')
        source = class_means(images.pooled, images.labels)
    spec = data_spec_from_args(args)
    advices = []
    for index, name in enumerate(data[0].components):
        single = replace(spec, components=(spec.components[index],))
        scratch = functools.partial(_random_init, args, single, own.random_init) if own.random_init else None
        try:
            measures = measure(*(split.of_component(index) for split in splits), data[0].class_names, source, scratch)
        except UserError as e:
            raise UserError(f'data component {name!r}: {e}') from e
        decision = decide(measures.values)
        settings = body_settings(decision, blocks)
        pilots = _pilots(args, single, own.pilot_epochs, decision, settings)
        advices.append(ComponentAdvice(
            name, net.name, measures, decision, settings if pilots[0].by_rules else {}, pilots))
    return advices


def _pilots(
        args: argparse.Namespace,
        data: DataSpec,
        epochs: Optional[int],
        decision: Decision,
        settings: Mapping[str, Any],
) -> list[Pilot]:
    """Train the settings with three LRs, and the best LR without them; the best first."""
    options, asked, batch = without_advised(args), common_plan(args), args.batch_size * args.grad_accum_steps
    high = _SGD_LR * batch / 32 if is_sgd(asked.opt) else _ADAM_LR
    if 'lr' in args.explicit or 'lr_base' in args.explicit:
        high = resolve_lr(args, batch)
    if epochs == 0:
        return [Pilot(high / 10 if decision.suited else high, True)]
    options.epochs = epochs or max(2, asked.epochs // 8)

    def run(lr: float, by_rules: bool) -> Pilot:
        options.lr = lr
        plan = plan_from_args(options, _ROLES, lr)
        plan.roles = {role: plan.roles[role] for role in _ROLES if role in plan.roles}  # not those of a composite
        plan = plan.with_role('head', lr=lr).with_role('backbone', lr=lr, **(settings if by_rules else {}))
        try:
            metrics = _short_training(options, data, plan)
        except Diverged:
            metrics = dict(top1=float('-inf'), loss=float('inf'))  # its LR is too high for these data
        pilot = Pilot(lr, by_rules, metrics['top1'], metrics['loss'])
        print(f'{data.components[0].name} under {args.model}, {pilot}', file=sys.stderr)
        return pilot

    def place(pilot: Pilot) -> tuple[float, float]:
        return -pilot.top1, pilot.loss

    found = [run(float(f'{high * share:.3g}'), True) for share in (0.1, 0.3, 1.)]
    found.append(run(min(found, key=place).lr, False))
    return sorted(found, key=place)


def _random_init(args: argparse.Namespace, data: DataSpec, epochs: int) -> tuple[float, float]:
    """Train the network from random weights (Plested et al., Table 1), with the augmentation of the options.

    The optimiser is SGD with a cosine schedule, a tenth of the epochs of warm-up and an LR of 0.05 at batch 32, or that
    of the options where they name an LR: the paper's difference "should still be pronounced even if suboptimal".

    Returns:
        Validation accuracy in percent and mean training loss, both of the last epoch.
    """
    print(f'Training {args.model} from random weights on {data.components[0].name}.', file=sys.stderr)
    how = dict(
        lr=_RANDOM_LR * args.batch_size * args.grad_accum_steps / 32, opt='sgd', momentum=0.9, weight_decay=1e-4)
    if 'lr' in args.explicit:
        asked = common_plan(args)
        how = {'lr': args.lr, **{name: getattr(asked, name) for name in _OPTIMIZER}}
    plan = Plan(epochs=epochs, schedule=Schedule(warmup_epochs=epochs // 10, warmup_scale=0.), **how)
    metrics = _short_training(args, data, plan, _START)
    return metrics['top1'], metrics['train_loss']


def _short_training(
        args: argparse.Namespace,
        data: DataSpec,
        plan: Plan,
        reset: Sequence[str] = (),
) -> dict[str, float]:
    """Train by a Plan and leave nothing; the metrics of the last epoch.

    Args:
        args: Options, of which neither the Plan nor the data count.
        data: What to train on.
        plan: How.
        reset: More options that do not count.
    """
    options = with_defaults(args, {*plan_flags(), *_NOT_OF_A_PILOT, *reset})
    options.recipe = {'data': data.to_mapping(), 'plan': plan.to_dict()}
    options.finds_plan, options.val_interval = False, plan.epochs
    with tempfile.TemporaryDirectory(prefix='timm_amf-') as scratch:
        options.output, options.experiment = scratch, 'pilot'
        try:
            run(args=options, quiet=True)
        except Interrupted as e:
            raise Interrupted(e.signum, 'interrupted') from e
        last = read_rows(Path(scratch, 'pilot', 'summary.csv'))[-1]
    return {name: float(last[column]) for name, column in (
        ('top1', 'eval_top1'), ('loss', 'eval_loss'), ('train_loss', 'train_loss'))}


def _rank(found: Sequence[tuple[str, Sequence[ComponentAdvice]]]) -> list[tuple[str, float, dict[str, float]]]:
    """(model, mean rank, mean of each measure), the best first; ranks by every measure that all models have."""
    names = [m for m in RANKING if all(m in c.measures.values for _, advices in found for c in advices)]
    table = np.array([[[c.measures.values[m] for m in names] for c in advices] for _, advices in found])
    ranks = rankdata(-table, method='min', axis=0).mean(axis=(1, 2))  # equal values share the better rank
    rows = [(name, float(rank), dict(zip(names, values.mean(axis=0).tolist())))
            for (name, _), rank, values in zip(found, ranks, table)]
    return sorted(rows, key=lambda row: row[1])


# -- Tables.

_NO_VOTE = {
    'emd': 'no vote: the paper finds it a poor predictor',
    'random_init': 'see above',
    'fixed_top1': 'see above',
}


def _component_table(advice: ComponentAdvice) -> str:
    """Tables: what each measure says; what each rule then says, and how surely; and the pilots."""
    measures, decision = advice.measures, advice.decision
    votes = {vote.measure: vote for vote in decision.votes}
    sides = {True: 'well suited', False: 'not well suited'}
    rows = [('measure', 'value', 'sides part at', 'speaks for', 'weight')]
    for key, label in LABELS.items():
        if key in votes:
            vote, (weight, why) = votes[key], RELIABILITY[key]
            rows.append((
                label, f'{vote.value:.4g}', f'{"" if vote.threshold == 0 else "about "}{vote.threshold:.3g}',
                f'{sides[vote.score > 0]} ({vote.score:+.2f})', f'{weight:g}: {why}'))
        elif key in measures.values:
            rows.append((label, f'{measures.values[key]:.4g}', '', '', _NO_VOTE.get(key, 'ranks models; no rule')))
        elif key in measures.missing:
            rows.append((label, '-', '', '', measures.missing[key]))
    agreeing, against = (
        ', '.join(LABELS[v.measure] for v in decision.votes if ((v.score > 0) == decision.suited) == agrees)
        for agrees in (True, False))
    rules = [('rule (Table 7)', 'advice', 'how sure', "the paper's results agree", 'for', 'against')]
    for name, suited, unsuited, support in RULES:
        sure = decision.sure * max(0., 2 * support - 1)
        rules.append((
            name, suited if decision.suited else unsuited, f'{sureness(sure)} ({sure:.2f})', f'{support:.0%}', agreeing,
            against))
    pilots, floor = [], measures.values['fixed_top1']
    if len(advice.pilots) > 1:
        pilots = ['Pilots, validation accuracy, the best first:', *(f'  {pilot}' for pilot in advice.pilots)]
        if advice.pilots[0].top1 < floor:
            pilots.append(f'All are below the fixed features ({floor:.2f}): give more --epochs, or take timm-amf fit, '
                          'which keeps these where training does not help.')
    return '\n'.join([
        f'{advice.name} under {advice.network}: {measures.images} training images, {measures.classes} classes',
        columns(rows),
        f'The pretrained weights are {sides[decision.suited]}, {sureness(decision.sure)} ({decision.sure:.2f}); '
        f"nearest of the paper's data sets: {decision.like}",
        columns(rules), *pilots])


def _plan_table(advice: Advice) -> str:
    """The settings of each role that the Plan names."""
    names = ('lr', 'low_blocks', 'low_lr_scale', 'reinit_blocks', 'l2sp_alpha', 'l2sp_blocks', 'weight_decay')
    followed = {role: c.name for role, c in advice.roles.items()}
    rows = [(f'plan for {advice.model}', 'follows', *names)]
    for role, settings in advice.plan.roles.items():
        values = (getattr(settings, name) for name in names)
        rows.append((role, followed.get(role, ''), *('' if v is None else f'{v:.4g}' for v in values)))
    return columns(rows)


def _ranking_table(ranking: Sequence[tuple[str, float, Mapping[str, float]]]) -> str:
    """Models by mean rank over the measures, the best first."""
    return columns([('model', 'mean rank', *(LABELS[name] for name in ranking[0][2])), *(
        (model, f'{rank:.2f}', *(f'{value:.4g}' for value in values.values())) for model, rank, values in ranking)])


# -- From Python, and as a command.

def _runs(
        words: Sequence[str],
        models: Optional[str] = None,
        data: Optional[Mapping] = None,
) -> list[argparse.Namespace]:
    """The options of each of `--models`, or of one run: a recipe has a start of its own, others have that of `fit`."""
    named = [item.strip().partition('=')[::2] for item in (models or '').split(',') if item.strip()]
    if models and (len(named) < 2 or len(dict(named)) < len(named)):
        raise UserError(f'--models {models}: name two different models or more, with commas between')
    recipe = any(word.split('=')[0] in ('--config', '-c') for word in words)
    words = [*(() if recipe else COMMON), *words, *(['--model', named[0][0]] if named else [])]
    if 'model' not in parse_args(words, data).explicit:
        raise UserError('no model: name one with --model, several with --models, or a recipe with --config')
    words = complete(words, data=data)
    extra = [['--model', name, *(['--pretrained-path', file] if file else [])] for name, file in named]
    return [parse_args([*words, *more], data) for more in extra or [[]]]


def advise(
        model: Optional[str] = None,
        data_dir: Union[str, Path, None] = None,
        config: Union[str, Path, None] = None,
        models: Union[str, Sequence[str], None] = None,
        source_dir: Union[str, Path, None] = None,
        random_init: int = 0,
        pilot_epochs: Optional[int] = None,
        source_classifier: bool = True,
        policy: Optional[str] = None,
        progress: bool = True,
        **options: Any,
) -> Advice:
    """Measure how well pretrained weights fit the data, and propose a Plan by Table 7 of the non-binary paper.

    Args:
        model: timm model, or an AMF or MultiTune.
        data_dir: Folder of the data; other data are among the options, or a section `data` of the recipe's form.
        config: Recipe or YAML file that sets options; those given here win.
        models: Backbones to rank, each a name or `name=file of weights`; the Plan is for the best.
        source_dir: Folder of images of the source data by class, for the EMD domain similarity.
        random_init: Epochs of training from random weights, 0 for none.
        pilot_epochs: Epochs of each pilot, 0 for none; an eighth of `epochs` and two at least where it is not given.
        source_classifier: The weights hold the classifier of the source data.
        policy: Policy network of an AMF that is proposed for a plain model; `none` for MultiTune.
        progress: Show bars.
        **options: Flags of `train_amf.py` by name, and `data`, a mapping.

    Returns:
        Measures, advice and Plan; `print` shows them as tables and `to_yaml` writes what `train_amf.py` runs.
    """
    models = models if models is None or isinstance(models, str) else ','.join(models)
    parser = PARSERS['advise']()
    own = parser.parse_args(words_of(parser, dict(
        source_dir=source_dir, random_init=random_init, pilot_epochs=pilot_epochs,
        no_source_classifier=not source_classifier, policy=policy)))
    words, data = keyword_words(dict(options, config=config, model=model, data_dir=data_dir))
    return _advise(own, _runs(words, models, data), progress)


def main(own: argparse.Namespace) -> None:
    """`timm-amf advise`: print the tables, write the file."""
    if os.path.exists(own.advice_file) and '--overwrite' not in own.words:
        raise UserError(f'{own.advice_file} exists; add --overwrite, or name another with --advice-file')
    advice = _advise(own, _runs(own.words, own.models))
    advice.to_yaml(own.advice_file)
    print(advice)
    print(f'\nRun it: timm-amf train --config {own.advice_file}')
