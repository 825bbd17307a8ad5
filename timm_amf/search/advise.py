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
import contextlib
import copy
import functools
import io
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
from accelerate import Accelerator

from timm_amf.data import DataSpec, Mixture, create_dataset, data_spec_from_args
from timm_amf.engine import build
from timm_amf.engine.head import start_head
from timm_amf.engine.loop import Trainer
from timm_amf.engine.options import build_parser, parse_args, resolve_lr
from timm_amf.engine.task import AdaptiveTask, create_criterion
from timm_amf.errors import CommandParser, UserError
from timm_amf.files import replacing
from timm_amf.models.method import RunSettings
from timm_amf.search.features import FeatureNet, Features, extract_features
from timm_amf.search.fit import COMMON, complete
from timm_amf.search.keywords import keyword_words
from timm_amf.search.proposal import (
    RULES,
    Decision,
    Target,
    body_settings,
    decide,
    is_sgd,
    plan_flags,
    propose,
    read_target,
    sureness,
    without_advised,
)
from timm_amf.search.transferability import LABELS, RANKING, Measures, class_means, measure
from timm_amf.text import columns
from timm_amf.tuning import Plan, create_optimizer, plan_from_args
from timm_amf.tuning.resolve import resolve

__all__ = ['Advice', 'ComponentAdvice', 'advise', 'main']

_RANDOM_LR = 0.05  # of SGD, at batch 32: far enough from bad for every network with batch norm
_ADAM_LR, _SGD_LR = 1e-3, 0.02  # the highest of the pilots' three; that of SGD at batch 32
# What training from random weights takes over from no options, besides all that a Plan's own flags set.
_RESET = (
    'pretrained', 'pretrained_path', 'initial_checkpoint', 'resume',
    'eval_only', 'dry_run', 'start_epoch', 'stop_epoch', 'early_stop', 'component', 'data_preset', 'data_dir',
    'dataset', 'log_wandb', 'branch_loss', 'policy_balance', 'routing_eps', 'num_classes', 'head_start', 'wise_ft',
)
_OPTIMIZER = {'opt', 'momentum', 'weight_decay', 'opt_eps', 'opt_betas', 'opt_kwargs'}


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
        return f'LR {self.lr:g}, {"" if self.by_rules else "without "}the settings of Table 7: ' + (
            'not measured' if self.top1 is None else f'{self.top1:.2f}')


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
        components: Of each component of the data, under each distinct network of the model.
        plan: The Plan.
        config: The whole YAML file that `train_amf.py --config` runs.
        notes: What the Plan leaves open, in sentences.
        ranking: With several models: mean rank of each, the best first.
        roles: For each body of the model, whose advice it follows.
    """
    model: str
    components: list[ComponentAdvice]
    plan: Plan
    config: str
    notes: list[str]
    roles: dict[str, ComponentAdvice]
    ranking: list[tuple[str, float, dict[str, float]]] = field(default_factory=list)

    @property
    def measures(self) -> dict[str, dict[str, float]]:
        """Component -> measure -> value, under the first network."""
        first = self.components[0].network
        return {c.name: dict(c.measures.values) for c in self.components if c.network == first}

    @property
    def advice(self) -> dict[str, str]:
        """Component -> the paper's data set whose settings it gets, such as `suited (DTD)`."""
        return {c.name: f'{"suited" if c.decision.suited else "unsuited"} ({c.decision.like})'
                for c in self.components if c.network == self.components[0].network}

    def __str__(self) -> str:
        parts = [_component_table(c) for c in self.components]
        if self.ranking:
            parts.insert(0, _ranking_table(self.ranking))
        parts.append(_plan_table(self.model, self.plan, {role: c.name for role, c in self.roles.items()}))
        return '\n\n'.join([*parts, *self.notes])

    def to_yaml(self, path: Union[str, Path]) -> None:
        """Write the file for `train_amf.py --config`, whole or not at all."""
        with replacing(path, 'choose another --advice-file') as temporary:
            temporary.write_text(self.config, encoding='utf-8')


def _own_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog='timm-amf advise', add_help=False, allow_abbrev=False,
        usage='%(prog)s [DIR] --model NAME [flags of train_amf.py] [flags below]',
        description='Measure how well pretrained weights fit the data, and propose a Plan for train_amf.py.')
    add = parser.add_argument
    add('-h', '--help', action='store_true', help='show this; timm-amf train --help shows the flags of train_amf.py')
    add('--models', metavar='A,B=FILE,...', help='rank these backbones (=FILE: of these weights), and advise the best')
    add('--pilot-epochs', type=int, metavar='N',
        help='epochs of each pilot, four for each component and network (default: an eighth of --epochs, 2 at least); '
             '0 for none, and an LR by Table 7')
    add('--source-dir', metavar='DIR', help='folder of images of the source data by class, for the EMD similarity')
    add('--random-init', type=int, default=0, metavar='EPOCHS',
        help="train the network from random weights, too: the paper's best measure, and dear")
    add('--no-source-classifier', action='store_true', help='the weights hold no classifier: leave LEEP and NCE out')
    add('--policy', metavar='NAME', help='policy network of an AMF that is proposed for a plain model; none: MultiTune')
    add('--advice-file', default='advice.yaml', metavar='FILE',
        help='file that timm-amf train --config runs (default: %(default)s); --overwrite replaces it')
    return parser


def _split_models(text: Optional[str]) -> list[tuple[str, str]]:
    """(model, file of its weights or '') of `--models`."""
    if not text:
        return []
    pairs = [item.strip().partition('=')[::2] for item in text.split(',') if item.strip()]
    names = [name for name, _ in pairs]
    if len(pairs) < 2 or len(set(names)) < len(names):
        raise UserError(f'--models {text}: name two different models or more, with commas between')
    return pairs


def _advise(own: argparse.Namespace, runs: Sequence[argparse.Namespace], progress: bool = True) -> Advice:
    """Advice for the flags of `advise`, and of train_amf.py: of one run, or one for each of `--models`."""
    for name, value in (('random-init', own.random_init), ('pilot-epochs', own.pilot_epochs or 0)):
        if value < 0:
            raise UserError(f'--{name}: must be at least 0, not {value}')
    accelerator = build.build_accelerator(_quiet(runs[0]))
    if accelerator.num_processes > 1:
        raise UserError('advise runs in one process; start it without accelerate launch or torchrun')
    train, val = build.build_data(runs[0], accelerator)
    found = []
    for args in runs:
        target = read_target(args, train.num_classes)
        found.append((args, target, _measure_networks(args, target, own, train, val, accelerator, progress)))
    ranking = _rank([(args.model, advices[0]) for args, _, advices in found]) if len(runs) > 1 else []
    best = ranking[0][0] if ranking else runs[0].model
    args, target, advices = next(entry for entry in found if entry[0].model == best)
    proposal = propose(args, target, advices, train.num_classes, own.policy)
    components = list({(c.network, c.name): c for network in advices for c in network}.values())
    if ranking:
        components = [c for _, _, networks in found for c in networks[0]]
    return Advice(
        proposal.model, components, proposal.plan, proposal.config, proposal.notes, proposal.followed, ranking)


def _quiet(args: argparse.Namespace) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(args), 'tracker': ['none'], 'log_wandb': False})


def _measure_networks(
        args: argparse.Namespace,
        target: Target,
        own: argparse.Namespace,
        train: Mixture,
        val: Mixture,
        accelerator,
        progress: bool,
) -> list[list[ComponentAdvice]]:
    """For each body of the model, the advice for each component; equal networks are measured once."""
    done: dict[str, list[ComponentAdvice]] = {}
    result = []
    for plain, body in zip(target.networks, target.bodies):
        key = repr((plain.model, plain.model_kwargs, plain.pretrained_cfg_overlay, plain.pretrained_path))
        if key not in done:
            done[key] = _measure_network(
                plain, target.blocks[body], own, train, val, accelerator, progress and not args.no_progress)
        result.append(done[key])
    return result


def _measure_network(
        plain: argparse.Namespace,
        blocks: int,
        own: argparse.Namespace,
        train: Mixture,
        val: Mixture,
        accelerator,
        progress: bool,
) -> list[ComponentAdvice]:
    net = FeatureNet(plain, accelerator, classifier=not own.no_source_classifier)
    splits = [
        extract_features(net, dataset, plain.cache_dir, progress, f'{net.name}: {split} features')
        for dataset, split in ((train, 'train'), (val, 'val'))]
    source = _source_means(net, own.source_dir, progress) if own.source_dir else None
    spec = data_spec_from_args(plain, plain.recipe.get('data'))
    advices = []
    for index, name in enumerate(train.components):
        features, evaluation = (split.of_component(index) for split in splits)
        single = DataSpec(**{**vars(spec), 'components': (spec.components[index],)})
        scratch = None
        if own.random_init:
            scratch = functools.partial(_random_init_accuracy, plain, single, own.random_init, accelerator)
        try:
            measures = measure(features, evaluation, train.class_names, source, scratch)
        except UserError as e:
            raise UserError(f'data component {name!r}: {e}') from e
        decision = decide(measures.values)
        settings = body_settings(decision, blocks)
        pilots = _pilots(plain, single, own.pilot_epochs, decision, settings, accelerator)
        advices.append(ComponentAdvice(
            name, net.name, measures, decision, settings if pilots[0].by_rules else {}, pilots))
    return advices


def _pilots(
        args: argparse.Namespace,
        data: DataSpec,
        epochs: Optional[int],
        decision: Decision,
        settings: Mapping[str, Any],
        accelerator: Accelerator,
) -> list[Pilot]:
    """Train the settings with three LRs, and the best LR without them; the best first."""
    batch = args.batch_size * args.grad_accum_steps
    options = without_advised(args)
    whole = plan_from_args(options, ['backbone', 'head'], 1.)
    high = _SGD_LR * batch / 32 if is_sgd(whole.opt) else _ADAM_LR
    if 'lr' in args.explicit or 'lr_base' in args.explicit:
        high = resolve_lr(args, batch)
    if epochs == 0:
        return [Pilot(high / 10 if decision.suited else high, True)]
    options.epochs = epochs or max(2, whole.epochs // 8)
    options.recipe = {'data': data.to_mapping()}

    def run(lr: float, by_rules: bool) -> Pilot:
        plan = plan_from_args(options, ['backbone', 'head'], lr)
        plan = plan.with_role('backbone', **settings) if by_rules else plan
        try:
            metrics = _short_training(options, plan, accelerator)
        except UserError as e:
            if 'not finite' not in str(e):
                raise
            metrics = dict(top1=float('-inf'), loss=float('inf'))  # its LR is too high for these data
        pilot = Pilot(lr, by_rules, metrics['top1'], metrics['loss'])
        print(f'{data.components[0].name} under {args.model}, {pilot}', file=sys.stderr)
        return pilot

    def place(pilot: Pilot) -> tuple[float, float]:
        return -pilot.top1, pilot.loss

    found = [run(float(f'{high * share:.3g}'), True) for share in (0.1, 0.3, 1.)]
    found.append(run(min(found, key=place).lr, False))
    return sorted(found, key=place)


def _source_means(net: FeatureNet, folder: str, progress: bool) -> tuple[np.ndarray, np.ndarray]:
    spec = DataSpec.from_mapping({'path': folder, 'name': 'source'})
    source = create_dataset(spec, 'train', in_chans=net.in_chans)
    features: Features = extract_features(net, source, net.args.cache_dir, progress, f'{net.name}: source features')
    return class_means(features.pooled.astype(np.float64), features.labels)


def _random_init_accuracy(
        args: argparse.Namespace,
        data: DataSpec,
        epochs: int,
        accelerator: Accelerator,
) -> tuple[float, float]:
    """Train the network from random weights (Plested et al., Table 1), with the augmentation of the options.

    The optimiser is SGD with a cosine schedule, a tenth of the epochs of warm-up and an LR of 0.05 at batch 32, or that
    of the options where they name an LR: the paper's difference "should still be pronounced even if suboptimal".

    Returns:
        Validation accuracy in percent and mean training loss, both of the last epoch.
    """
    print(f'Training {args.model} from random weights on {data.components[0].name}.', file=sys.stderr)
    options = copy.deepcopy(args)
    defaults = vars(build_parser().parse_args([]))
    for name in (*_RESET, *plan_flags() - _OPTIMIZER):
        setattr(options, name, copy.deepcopy(defaults[name]))
    batch = args.batch_size * args.grad_accum_steps
    if 'lr' in args.explicit:
        options.lr = resolve_lr(args, batch)
    else:
        options.lr, options.opt, options.momentum, options.weight_decay = _RANDOM_LR * batch / 32, 'sgd', 0.9, 1e-4
    options.sched, options.epochs, options.warmup_epochs = 'cosine', epochs, epochs // 10
    options.min_lr, options.warmup_lr = 0., 0.
    options.recipe = {'data': data.to_mapping()}
    metrics = _short_training(options, plan_from_args(options, ['backbone', 'head'], options.lr), accelerator)
    return metrics['top1'], metrics['train_loss']


def _short_training(options: argparse.Namespace, plan: Plan, accelerator: Accelerator) -> dict[str, float]:
    """Train by a Plan and leave nothing; the metrics of the last epoch."""
    options = argparse.Namespace(**{**vars(options), 'checkpoint_hist': None, 'wise_ft': False, 'split_file': None})
    train, val = build.build_data(options, accelerator)
    model = build.place_model(build.build_model(options, train.num_classes), options, accelerator)
    loaders = build.build_loaders(options, model, train, val, accelerator)
    table = resolve(model, plan)
    build.set_start(model, table, options, train.num_classes)
    start_head(model, options, train, accelerator, table)
    mixup = build.build_mixup(options, model.num_classes)
    task = AdaptiveTask(
        model, RunSettings(plan), device=accelerator.device,
        criterion=create_criterion(options, mixup is not None, train))
    with tempfile.TemporaryDirectory(prefix='timm_amf-') as folder, contextlib.redirect_stdout(io.StringIO()):
        trainer = Trainer(
            options, accelerator, task, table, create_optimizer(model, table), *loaders, Path(folder), mixup)
        while trainer.epoch < trainer.epochs:
            trained = trainer.train_epoch()
            evaluated = trainer.evaluate() if trainer.epoch + 1 == trainer.epochs else None
            trainer.finish_epoch(trained, evaluated)
    for loader in loaders:
        loader.close()
    accelerator.free_memory()
    return {**evaluated, 'train_loss': trained['loss']}


def _rank(found: Sequence[tuple[str, Sequence[ComponentAdvice]]]) -> list[tuple[str, float, dict[str, float]]]:
    """(model, mean rank, mean of each measure), the best first; ranks by every measure that all models have."""
    names = [m for m in RANKING if all(m in c.measures.values for _, advices in found for c in advices)]
    number = len(found[0][1])
    table = np.array([[[c.measures.values[m] for m in names] for c in advices] for _, advices in found])
    ranks = 1 + (table[:, None] < table[None]).sum(axis=1)  # equal values share the better rank
    means = ranks.reshape(len(found), number * len(names)).mean(axis=1)
    rows = [(name, float(mean), dict(zip(names, values.mean(axis=0).tolist())))
            for (name, _), mean, values in zip(found, means, table)]
    return sorted(rows, key=lambda row: row[1])


# -- Tables.

_NO_VOTE = {
    'emd': 'no vote: the paper finds it a poor predictor',
    'random_init': 'see above',
    'fixed_top1': 'see above',
}
_ORDER = (
    'random_minus_fixed', 'fixed_accuracy', 'fisher', 'emd', 'random_init', 'fixed_top1', 'log_me', 'leep', 'nce',
    'h_score', 'trans_rate',
)


def _component_table(advice: ComponentAdvice) -> str:
    """Tables: what each measure says; what each rule then says, and how surely; and the pilots."""
    name, network, measures, decision = advice.name, advice.network, advice.measures, advice.decision
    votes = {vote.measure: vote for vote in decision.votes}
    rows = [('measure', 'value', 'sides part at', 'speaks for', 'weight')]
    for key in _ORDER:
        label = LABELS[key]
        if key in votes:
            vote = votes[key]
            side = 'well suited' if vote.score > 0 else 'not well suited'
            rows.append((
                label, f'{vote.value:.4g}', f'{"" if vote.threshold == 0 else "about "}{vote.threshold:.3g}',
                f'{side} ({vote.score:+.2f})', f'{vote.reliability:g}: {vote.why}'))
        elif key in measures.values:
            rows.append((label, f'{measures.values[key]:.4g}', '', '', _NO_VOTE.get(key, 'ranks models; no rule')))
        elif key in measures.missing:
            rows.append((label, '-', '', '', measures.missing[key]))
    side = 'well suited' if decision.suited else 'not well suited'
    names = {True: [], False: []}
    for vote in decision.votes:
        names[(vote.score > 0) == decision.suited].append(LABELS[vote.measure])
    rules = [('rule (Table 7)', 'advice', 'how sure', "the paper's results agree", 'for', 'against')]
    for rule in RULES.values():
        sure = decision.sure * max(0., 2 * rule.support - 1)
        rules.append((
            rule.name, rule.suited if decision.suited else rule.unsuited, f'{sureness(sure)} ({sure:.2f})',
            f'{rule.support:.0%}', ', '.join(names[True]), ', '.join(names[False])))
    title = f'{name} under {network}: {measures.images} training images, {measures.classes} classes'
    verdict = f'The pretrained weights are {side}, {sureness(decision.sure)} ({decision.sure:.2f}); nearest of the ' \
              f"paper's data sets: {decision.like}"
    tried = ['Pilots, validation accuracy, the best first:', *(f'  {pilot}' for pilot in advice.pilots)]
    return '\n'.join([title, columns(rows), verdict, columns(rules), *(tried if len(tried) > 2 else ())])


def _plan_table(model: str, plan: Plan, followed: Mapping[str, str]) -> str:
    """The settings of each role that the Plan names."""
    names = ('lr', 'low_blocks', 'low_lr_scale', 'reinit_blocks', 'l2sp_alpha', 'l2sp_blocks', 'weight_decay')
    rows = [(f'plan for {model}', 'follows', *names)]
    for role, settings in plan.roles.items():
        values = [getattr(settings, name) for name in names]
        rows.append((role, followed.get(role, ''), *('' if v is None else f'{v:.4g}' for v in values)))
    return columns(rows)


def _ranking_table(ranking: Sequence[tuple[str, float, Mapping[str, float]]]) -> str:
    """Models by mean rank over the measures, the best first."""
    names = list(ranking[0][2])
    rows = [('model', 'mean rank', *(LABELS[name] for name in names))]
    for model, rank, values in ranking:
        rows.append((model, f'{rank:.2f}', *(f'{values[name]:.4g}' for name in names)))
    return columns(rows)


# -- From Python, and as a command.

def _runs(
        words: Sequence[str],
        models: Sequence[tuple[str, str]],
        data: Optional[Mapping] = None,
) -> list[argparse.Namespace]:
    """The options of each model: a recipe has a start of its own, others have that of `fit`."""
    recipe = any(word.split('=')[0] in ('--config', '-c') for word in words)
    words = [*(() if recipe else COMMON), *words]
    if models:
        words = [*words, '--model', models[0][0]]
    if 'model' not in parse_args(words, data).explicit:
        raise UserError('no model: name one with --model, several with --models, or a recipe with --config')
    words = complete(words, data=data)
    named = [['--model', name, *(['--pretrained-path', file] if file else [])] for name, file in models]
    return [parse_args([*words, *extra], data) for extra in named or [[]]]


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
    models = _split_models(models if models is None or isinstance(models, str) else ','.join(models))
    own = argparse.Namespace(
        source_dir=source_dir, random_init=random_init, pilot_epochs=pilot_epochs,
        no_source_classifier=not source_classifier, policy=policy)
    words, data = keyword_words(config, dict(options, model=model, data_dir=data_dir))
    return _advise(own, _runs(words, models, data), progress)


def main(argv: Optional[Sequence[str]] = None) -> None:
    """`timm-amf advise`: print the tables, write the file."""
    own, rest = _own_parser().parse_known_args(argv)
    if own.help:
        _own_parser().print_help()
        return
    if os.path.exists(own.advice_file) and '--overwrite' not in rest:
        raise UserError(f'{own.advice_file} exists; add --overwrite, or name another with --advice-file')
    advice = _advise(own, _runs(rest, _split_models(own.models)))
    advice.to_yaml(own.advice_file)
    print(advice)
    print(f'\nRun it: timm-amf train --config {own.advice_file}')
