"""`timm-amf search`: find the layers, blocks or windows that are worth tuning (the block-wise paper).

    timm-amf search DIR --model resnet50
    timm-amf search DIR --model resnet50 --ways layer block window top3 top5 --budget 30
    timm-amf search DIR --model vgg16 --protocol paper --experiment vgg16-0 --seed 0
    timm-amf search --compare RUN RUN ...
    train_amf.py --config RUN/best.yaml

It takes the flags of train_amf.py, so the search is for the run that these name.
"""
import argparse
import copy
import dataclasses
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Optional, Union

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from timm.data import resolve_data_config
from torch import nn

from timm_amf.data import Mixture, create_dataset, data_spec_from_args, splits_from_args
from timm_amf.data.check import check_images
from timm_amf.engine import build
from timm_amf.engine.config_file import find_config
from timm_amf.engine.options import parse_args, resolve_lr, save_args
from timm_amf.errors import UserError
from timm_amf.search.block_tables import methods_table, ranking, summary, write_csv, write_methods_csv
from timm_amf.search.candidates import (
    CUTS,
    Candidate,
    baseline_candidates,
    block_candidates,
    candidate_plan,
    layer_candidates,
    top_candidate,
    weighted_layers,
    window_candidates,
)
from timm_amf.search.contest import Contest, Stage
from timm_amf.search.heads import mlp_head
from timm_amf.search.proposal import config_text
from timm_amf.search.results import CandidateResult, SearchResults
from timm_amf.search.shares import Fit, fit_budget, stratified
from timm_amf.tuning import Plan, Schedule, model_roles, plan_from_args
from timm_amf.tuning.roles import role_blocks

__all__ = ['BlockSearch', 'main', 'search_blocks']

_logger = logging.getLogger(__name__)

WAYS = ('layer', 'block', 'window')
_PAPER_WAYS = ('layer', 'block', 'window', 'top3', 'top5')
# Section V of the paper, whose text has lost the LR. At Keras' own for Adam, 0.001, a network that is tuned as a whole
# forgets what it knew.
_PAPER_OPTIONS = dict(
    opt='adam', lr=1e-4, weight_decay=0, batch_size=4, epochs=50, sched='plateau', patience_epochs=10, decay_rate=0.1,
    warmup_epochs=0, smoothing=0, no_aug=True,
)
_PAPER_SHARES = dict(search_share=0.1, final_share=0.7, val_share=0.2)
# Of train_amf.py: what would give other results than candidates get here, and what only its own loop has.
_REFUSED = (
    'loss', 'bce_loss', 'jsd_loss', 'aug_splits', 'split_bn', 'kd_model_name', 'grad_accum_steps', 'global_k',
    'torchcompile', 'dry_run', 'eval_only',
)
_LEFT_OUT = ('model_ema', 'mixup_off_epoch', 'branch_loss', 'policy_balance')
_STEPS = 3  # that are timed for --budget


@dataclass
class BlockSearch:
    """What `search_blocks` found.

    Attributes:
        results: All candidates, and how they fared.
        plan: The Plan that trains the best of them.
        config: The whole YAML file that `train_amf.py --config` runs.
        notes: What else there is to say, in sentences.
        folder: Where its files are.
    """
    results: SearchResults
    plan: Plan
    config: str
    notes: list[str] = field(default_factory=list)
    folder: Optional[Path] = None

    @property
    def best(self) -> CandidateResult:
        """The best candidate, a baseline if that is better than all."""
        return self.results.winner()

    def __str__(self) -> str:
        return '\n\n'.join([ranking(self.results, limit=5), summary(self.results), *self.notes])

    def to_yaml(self, path: Union[str, Path]) -> None:
        """Write the file for `train_amf.py --config`, whole or not at all.

        Raises:
            UserError: If it cannot be written.
        """
        path = Path(path)
        temporary = path.with_name(f'{path.name}.tmp')
        try:
            temporary.write_text(self.config, encoding='utf-8')
            os.replace(temporary, path)
        except OSError as e:
            temporary.unlink(missing_ok=True)
            raise UserError(f'{path}: cannot be written ({e.strerror}); choose another folder') from None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _own_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog='timm-amf search', add_help=False, allow_abbrev=False,
        usage='%(prog)s [DIR] --model NAME [flags of train_amf.py] [flags below]',
        description='Find the layers, blocks or windows of layers that are worth tuning.')
    add = parser.add_argument
    add('-h', '--help', action='store_true', help='show this; timm-amf train --help shows the flags of train_amf.py')
    add('--ways', nargs='+', default=['block'], metavar='WAY',
        help='what to choose from: layer, block, window, and topK of the layers, such as top3 (default: block)')
    add('--cut', default='residual', metavar='WHERE', help=f'what ends a block: {", ".join(CUTS)} (default: residual)')
    add('--window', type=int, default=3, metavar='N', help='layers of a window (default: %(default)s)')
    add('--separate-norms', action='store_true', help='norms are layers of their own, as in the paper')
    add('--search-role', metavar='ROLE', help='part of the model to search, such as branch.0 (default: the backbone)')
    add('--search-epochs', type=int, metavar='N', help='epochs of each candidate (default: 10, or --epochs if fewer)')
    add('--search-share', type=float, default=1., metavar='X',
        help='share of the training images that candidates are trained on (default: all)')
    add('--final-share', type=float, default=0., metavar='X',
        help='train the best of each way and both baselines anew, for --epochs, on this share (default: do not)')
    add('--protocol', choices=('paper',), help="the paper's: 10 %% of all images for the search, 70 %% for training "
        'the best of each way, 20 %% for validation; its classifier, optimiser and schedule')
    add('--search-head', choices=('own', 'mlp'), help="the model's own classifier, or the paper's of three layers")
    add('--budget', type=float, metavar='MINUTES', help='let this decide on images and epochs')
    add('--halving', type=float, metavar='SHARE', help='successive halving: keep this share at each rung')
    add('--chunk', type=int, metavar='N', help='most candidates that train at once')
    add('--memory', type=float, metavar='GB', help='most memory for their activations (default: half of what is free)')
    add('--cache-gb', type=float, default=4., metavar='GB',
        help='most disk for what arrives at the candidates, where images are not augmented; 0: none (default: '
             '%(default)s)')
    add('--one-by-one', action='store_true', help='train each candidate in a network of its own')
    add('--compare', nargs='+', metavar='RUN', help="the paper's Table I from folders of finished searches")
    add('--table-file', metavar='FILE', help='with --compare: write it as CSV, and the figure beside it')
    return parser


def _check_own(own: argparse.Namespace) -> None:
    for way in own.ways:
        if way not in WAYS and not (way.startswith('top') and way[3:].isdigit() and int(way[3:]) > 0):
            raise UserError(f'--ways {way}: unknown; choose from {", ".join(WAYS)} and topK, such as top3')
    if own.cut not in CUTS:
        raise UserError(f'--cut {own.cut}: unknown; choose one of {", ".join(CUTS)}')
    for name in ('search_share', 'final_share'):
        value = getattr(own, name)
        if not (0 < value <= 1 or (value == 0 and name == 'final_share')):
            raise UserError(f'--{name.replace("_", "-")} {value:g}: must be above 0 and at most 1')
    if own.halving is not None and not 0 < own.halving < 1:
        raise UserError(f'--halving {own.halving:g}: must be above 0 and below 1, such as 0.5')
    for name in ('search_epochs', 'budget', 'chunk', 'memory'):
        value = getattr(own, name)
        if value is not None and value <= 0:
            raise UserError(f'--{name.replace("_", "-")} {value:g}: must be above 0')
    if not own.cache_gb >= 0:
        raise UserError(f'--cache-gb {own.cache_gb:g}: must be 0 or above')
    if own.protocol and own.budget:
        raise UserError('--budget changes images and epochs, which --protocol fixes; give one of them')


def _check_args(args: argparse.Namespace) -> None:
    """What of train_amf.py the search has not."""
    if 'model' not in args.explicit:
        raise UserError('no model: name one with --model, or a recipe with --config')
    usual = {'loss': 'ce', 'grad_accum_steps': 1}
    for name in _REFUSED:
        value = getattr(args, name)
        if value and value != usual.get(name):
            raise UserError(f'--{name.replace("_", "-")}: a search cannot train with it; leave it out of the search')
    if args.resume not in ('', 'auto'):
        raise UserError(f'--resume {args.resume}: give auto, and the --output and --experiment of the search')
    if args.resume and not args.experiment:
        raise UserError('--resume auto: name the search that goes on with --experiment')


def _preset_flags() -> list[str]:
    flags = []
    for name, value in _PAPER_OPTIONS.items():
        flags += [f'--{name.replace("_", "-")}', *([] if value is True else [str(value)])]
    return flags


def _parse(argv: Sequence[str], preset: bool = True) -> tuple[argparse.Namespace, argparse.Namespace]:
    """The flags of the search, and those of train_amf.py, before which come those of `--protocol` with `preset`."""
    parser = _own_parser()
    own, rest = parser.parse_known_args(argv)
    if own.protocol:
        given = {a.split('=')[0] for a in argv}
        for name in ('--search-share', '--final-share'):
            if name in given:
                raise UserError(f'{name}: --protocol fixes it; leave one of them out')
        own.ways = own.ways if '--ways' in given else list(_PAPER_WAYS)
        own.search_head = own.search_head or 'mlp'
        own.search_share, own.final_share = _PAPER_SHARES['search_share'], _PAPER_SHARES['final_share']
        rest = [*_preset_flags(), *rest] if preset else rest
    _check_own(own)
    args = parse_args(rest)
    _check_args(args)
    if not args.initial_checkpoint and not args.pretrained:
        args.pretrained = True
        args.explicit.add('pretrained')
    default = args.epochs if own.protocol else min(10, args.epochs)
    own.search_epochs = own.search_epochs or default
    own.search_head = own.search_head or 'own'
    return own, args


class _Search:
    """One search, from its flags to its files."""

    def __init__(self, own: argparse.Namespace, args: argparse.Namespace, progress: bool):
        self.own, self.args = own, args
        self.accelerator = build.build_accelerator(argparse.Namespace(
            **{**vars(args), 'tracker': ['none'], 'log_wandb': False}))
        self.progress = progress and not args.no_progress and self.accelerator.is_local_main_process
        left_out = [f'--{n.replace("_", "-")}' for n in _LEFT_OUT if getattr(args, n)]
        self.notes = [f'Candidates were trained without {", ".join(left_out)}.'] if left_out else []
        self.started = time.monotonic()
        # Not args.output's default, where runs are.
        named = argparse.Namespace(**{**vars(args), 'output': args.output or 'output/search'})
        self.folder = build.run_folder(named, self.accelerator)

    # -- data and model -----------------------------------------------------------------------------------------------

    def open_data(self) -> tuple[Mixture, Optional[Mixture], Mixture]:
        """Images for the search, for training its winners (or None), and for validation."""
        own, args = self.own, self.args
        if own.protocol:
            spec = data_spec_from_args(args, args.recipe.get('data'))
            with self.accelerator.local_main_process_first():
                pool = create_dataset(spec, '+'.join(dict.fromkeys(splits_from_args(args))))
                if args.check_images:
                    check_images(pool, args.skip_bad_images, args.cache_dir, args.workers,
                                 self.accelerator.is_local_main_process)
            search, final, val = stratified(pool, list(_PAPER_SHARES.values()), args.seed)
            return search, final, val
        train, val = build.build_data(args, self.accelerator)
        if own.search_share + own.final_share <= 1 and own.final_share:
            search, final = stratified(train, [own.search_share, own.final_share], args.seed)
            return search, final, val
        part = [stratified(train, [s], args.seed + i)[0] if 0 < s < 1 else train
                for i, s in enumerate((own.search_share, own.final_share))]
        return part[0], part[1] if own.final_share else None, val

    def build_model(self, num_classes: int) -> tuple[nn.Module, Plan]:
        args = self.args
        model = build.build_model(args, num_classes)
        model = build.place_model(model, args, self.accelerator)
        roles = model_roles(model)
        role = self.own.search_role or next((r for r in roles if r not in ('head', 'policy')), None)
        if role not in roles or not role_blocks(model, role):
            raise UserError(f'--search-role {role}: the model has no blocks there; it has {", ".join(roles)}')
        self.role = role
        lr = resolve_lr(args, args.batch_size * self.accelerator.num_processes * args.grad_accum_steps)
        plan = plan_from_args(args, roles, lr)
        if plan.role('head').train == 'none':
            raise UserError('plan: the classifier must train in a search; leave the train of role head out')
        for name in (role, 'head'):
            if plan.role(name).start_epoch:
                raise UserError(f'plan: role {name} must train from the start in a search; leave its start_epoch out')
        build.set_start(model, plan, args, num_classes)
        return model, plan

    # -- the search ---------------------------------------------------------------------------------------------------

    def run(self) -> BlockSearch:
        args = self.args
        search, final, val = self.open_data()
        model, plan = self.build_model(search.num_classes)
        self.input_size = resolve_data_config(vars(args), model=model, verbose=False)['input_size']
        candidates, layers = self._candidates(model)
        contest = self._contest(model, plan, search.num_classes)
        self._prepare_folder()
        best_plan = _frozen_elsewhere(plan, model, self.role)
        if (self.folder / 'results.json').exists():  # nothing is left to do
            return self._finish(SearchResults.read(self.folder / 'results.json'), best_plan)
        self._keep_chunks(contest)
        everything = val
        search, val, epochs = self._fit(contest, candidates, search, val)
        contest.plan = _shorter(contest.plan, epochs)
        results = SearchResults(args.model, self.role, args.seed, search.num_classes, len(search))
        stage = self._stage(contest, 'search', search, val, epochs)
        results.results = contest.run(candidates, stage)
        tops = self._top_candidates(layers, results)
        if tops:
            results.results += contest.run(tops, dataclasses.replace(stage, name='top', rungs=()))
        _close(stage)
        if final is not None:
            contest.plan, contest.args = best_plan, args
            chosen = [results.winner(way).candidate for way in ('classifier', 'all', *results.ways)]
            results.final_images = len(final)
            results.final = contest.run(
                chosen, self._stage(contest, 'final', final, everything, plan.epochs, halving=False))
        results.seconds = time.monotonic() - self.started
        if contest.why_alone:
            self.notes.append(f'Candidates were trained one after the other: {contest.why_alone}.')
        return self._finish(results, best_plan)

    def _candidates(self, model: nn.Module) -> tuple[list[Candidate], list]:
        """Both baselines and the candidates of all ways but the tops, which wait for the layers'; and the layers."""
        own = self.own
        norms = 'separate' if own.separate_norms else 'joined'
        tops = [way for way in own.ways if way not in WAYS]
        ways = [way for way in WAYS if way in own.ways or (way == 'layer' and tops)]
        try:
            layers = weighted_layers(model, self.input_size, self.role, norms)
        except (AssertionError, RuntimeError, ValueError) as e:  # whatever an architecture makes of another size
            size, cause = 'x'.join(map(str, self.input_size)), (str(e) or repr(e)).splitlines()[0]
            raise UserError(
                f'--img-size: {self.args.model} takes no images of {size} ({cause}); give another, '
                f'or --model-kwargs img_size={self.input_size[-1]} if it is built for a size') from e
        found = baseline_candidates()
        if 'layer' in ways:
            found += layer_candidates(layers)
        if 'block' in ways:
            found += block_candidates(model, self.input_size, self.role, own.cut)
        if 'window' in ways:
            found += window_candidates(layers, own.window)
        for way in tops:
            if int(way[3:]) > len(layers):
                raise UserError(f'--ways {way}: the model has {len(layers)} layers')
        return found, layers

    def _top_candidates(self, layers: list, results: SearchResults) -> list[Candidate]:
        ways = [way for way in dict.fromkeys(self.own.ways) if way not in WAYS]
        # What halving stopped is behind all that went on.
        accuracies = {r.candidate.name: r.top1 - 100 * r.stopped for r in results.of_way('layer')}
        return [top_candidate(layers, accuracies, int(way[3:])) for way in ways]

    def _contest(self, model: nn.Module, plan: Plan, num_classes: int) -> Contest:
        own, args = self.own, self.args
        head = mlp_head(model, self.input_size, num_classes, args.seed) if own.search_head == 'mlp' else None
        return Contest(
            model, self.input_size, _frozen_elsewhere(plan, model, self.role), self.role, args, self.accelerator, head,
            lockstep=not own.one_by_one and self.role == 'backbone', chunk=own.chunk,
            memory=own.memory * 2**30 if own.memory else _free_memory(self.accelerator) / 2,
            mixup=build.build_mixup(args, num_classes), folder=self.folder / 'state',
            cache_bytes=own.cache_gb * 2**30, progress=self.progress)

    def _stage(self, contest, name: str, train: Mixture, val: Mixture, epochs: int, halving: bool = True) -> Stage:
        # Copies, since loaders give them a cache, after which no share of them can be taken.
        loaders = build.build_loaders(self.args, contest.model, copy.copy(train), copy.copy(val), self.accelerator)
        rungs = _rungs(epochs, self.own.halving) if self.own.halving and halving else ()
        return Stage(name, *loaders, epochs, rungs, self.own.halving or 0.5)

    def _keep_chunks(self, contest: Contest) -> None:
        """Cut what goes on into the chunks of its first start: how much memory is free changes.

        Raises:
            UserError: If other ones are asked for.
        """
        path = self.folder / 'state' / 'chunks.yaml'
        chunk, memory = contest.chunk, contest.memory
        if self.accelerator.is_main_process:
            if path.exists():
                chunk, memory = yaml.safe_load(path.read_text(encoding='utf-8'))
            else:
                path.write_text(yaml.safe_dump([chunk, memory]), encoding='utf-8')
        # Of the main process: less may be free where another one runs.
        contest.chunk, contest.memory = broadcast_object_list([chunk, memory])
        if self.own.chunk not in (None, contest.chunk) or self.own.memory not in (None, contest.memory / 2**30):
            raise UserError(
                f'{self.folder}: --chunk and --memory stay as they were; leave them out, or add --overwrite')

    def _fit(self, contest: Contest, candidates: Sequence[Candidate], train: Mixture, val: Mixture):
        """Images and epochs: as asked for, or what fits into the budget."""
        own, args = self.own, self.args
        if not own.budget:
            return train, val, own.search_epochs
        path = self.folder / 'budget.yaml'
        # Of a search that goes on: the same images and epochs.
        known = path.read_text(encoding='utf-8') if self.accelerator.is_main_process and path.exists() else ''
        known = broadcast_object_list([known])[0]
        if known:
            fit = Fit(**yaml.safe_load(known))
        else:
            stage = self._stage(contest, 'timing', train, val, 1)
            costs = broadcast_object_list(list(contest.costs(candidates, stage, _STEPS)))
            _close(stage)
            least = 2 / max(1, train.class_counts().min())
            fit = fit_budget(own.budget * 60, len(train), len(val), *costs, args.epochs, min(1., least))
            if self.accelerator.is_main_process:
                path.write_text(yaml.safe_dump(dataclasses.asdict(fit)), encoding='utf-8')
        contest.args = argparse.Namespace(**{**vars(args), 'val_interval': fit.epochs})
        if fit.share < 1:
            train = stratified(train, [fit.share], args.seed)[0]
        if fit.val_share < 1:
            val = stratified(val, [fit.val_share], args.seed)[0]
        self.notes.append(
            f'For {own.budget:g} minutes: {fit.epochs} epochs on {len(train)} images, validated on {len(val)}.')
        if self.accelerator.is_main_process:
            print(self.notes[-1], file=sys.stderr)
        return train, val, fit.epochs

    # -- files --------------------------------------------------------------------------------------------------------

    def _identity(self) -> str:
        """What the results follow from, as text."""
        skip = ('overwrite', 'resume', 'no_progress', 'workers', 'explicit', 'config', 'output', 'experiment')
        values = {k: v for k, v in vars(self.args).items() if k not in skip}
        flags = {k: v for k, v in vars(self.own).items() if k not in ('chunk', 'memory', 'cache_gb', 'help')}
        return yaml.safe_dump(_plain({'search': flags, 'options': values}), sort_keys=True)

    def _prepare_folder(self) -> None:
        """Make the folder, or find that it holds this search, which goes on.

        Raises:
            UserError: If it holds another, or one that may not be overwritten.
        """
        args, path, identity = self.args, self.folder / 'search.yaml', self._identity()
        if not self.accelerator.is_main_process:
            self.accelerator.wait_for_everyone()
            return
        if path.exists() and not args.overwrite:
            if not args.resume:
                raise UserError(f'{self.folder}: holds a search already; go on with --resume auto, or add --overwrite')
            if path.read_text(encoding='utf-8') != identity:
                raise UserError(
                    f'{self.folder}: holds a search with other settings; give the same ones, or add --overwrite')
        elif self.folder.exists() and args.overwrite:
            shutil.rmtree(self.folder / 'state', ignore_errors=True)
            for name in ('results.json', 'budget.yaml'):
                (self.folder / name).unlink(missing_ok=True)
        try:
            (self.folder / 'state').mkdir(parents=True, exist_ok=True)
            path.write_text(identity, encoding='utf-8')
            save_args(args, self.folder / 'args.yaml')
        except OSError as e:
            raise UserError(f'{self.folder}: cannot be written ({e.strerror}); choose another --output') from None
        self.accelerator.wait_for_everyone()

    def _finish(self, results: SearchResults, plan: Plan) -> BlockSearch:
        best = results.winner()
        chosen = candidate_plan(plan, best.candidate, self.role)
        header = [
            '# By `timm-amf search`: of all candidates the best on validation images.',
            f'# {best.candidate.way} {best.candidate.name}: {best.top1:.2f} % of {best.images}; classifier only '
            f'{results.winner("classifier").top1:.2f}, all layers {results.winner("all").top1:.2f}']
        found = BlockSearch(results, chosen, config_text(self.args, chosen, header), self.notes, self.folder)
        if self.accelerator.is_main_process:
            results.write(self.folder / 'results.json')
            write_csv(results, self.folder / 'candidates.csv')
            found.to_yaml(self.folder / 'best.yaml')
            from timm_amf.search.block_plots import plot_search

            try:
                plot_search(results, self.folder / 'search.png')
            except UserError as e:  # the figure is an extra; the rest is there
                self.notes.append(f'No figure: {e}')
            shutil.rmtree(self.folder / 'state', ignore_errors=True)
        return found


def _close(stage: Stage) -> None:
    """End the workers of its loaders."""
    stage.train_loader.close()
    stage.val_loader.close()


def _frozen_elsewhere(plan: Plan, model: nn.Module, role: str) -> Plan:
    """The Plan with all other networks of a composite frozen; what is searched and the classifier stay."""
    for other in model_roles(model):
        if other not in (role, 'head'):
            plan = plan.with_role(other, train='none')
    return plan


def _shorter(plan: Plan, epochs: int) -> Plan:
    """A Plan for fewer epochs, its schedules drawn together."""
    factor = epochs / max(1, plan.epochs)
    if factor == 1:
        return plan

    def scaled(values: Mapping[str, Any]) -> dict[str, Any]:
        changed = {k: factor * values[k] for k in ('warmup_epochs', 'hold_epochs', 'decay_epochs') if values.get(k)}
        if values.get('decay_milestones'):
            changed['decay_milestones'] = [max(1, round(factor * m)) for m in values['decay_milestones']]
        return {**values, **changed}

    schedule = Schedule(**{**scaled(vars(plan.schedule)), 'cooldown_epochs': 0})
    roles = {name: role if role.schedule is None else dataclasses.replace(role, schedule=scaled(role.schedule))
             for name, role in plan.roles.items()}
    return dataclasses.replace(plan, epochs=epochs, schedule=schedule, roles=roles)


def _rungs(epochs: int, keep: float) -> list[int]:
    """Epochs after which a share goes on: each candidate's effort grows as their number falls."""
    rungs, at = [], epochs * keep
    while at >= 1:
        rungs.insert(0, int(at))
        at *= keep
    return sorted({r for r in rungs if 0 < r < epochs})[-3:]


def _free_memory(accelerator: Accelerator) -> float:
    """Bytes."""
    if accelerator.device.type == 'cuda':
        return float(torch.cuda.mem_get_info(accelerator.device)[0])
    try:
        return float(os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'))
    except (ValueError, OSError, AttributeError):  # not on every system
        return 4. * 2**30


def _plain(value: Any) -> Any:
    """As YAML can hold it."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [_plain(v) for v in value]
        return sorted(items, key=str) if isinstance(value, (set, frozenset)) else items
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


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
        content = {**content, **_PAPER_OPTIONS}
    actions = {a.dest: a for a in _own_parser()._actions if a.dest not in ('help', 'compare', 'table_file')}
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
            own, args = _parse([*argv, '--config', str(path)], preset=False)
        except UserError as e:
            raise UserError(str(e).replace(str(path), 'search_blocks')) from e.__cause__
    with torch.random.fork_rng():
        return _Search(own, args, progress).run()


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
    try:
        own, _ = _own_parser().parse_known_args(argv)
        if own.help:
            _own_parser().print_help()
            return 0
        if own.compare:
            _compare(own)
            return 0
        own, args = _parse(argv)
        search = _Search(own, args, progress=True)
        previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            found = search.run()
        finally:
            signal.signal(signal.SIGTERM, previous)
        if search.accelerator.is_main_process:
            print(found)
            print(f'\nRun it: train_amf.py --config {found.folder / "best.yaml"}')
    except UserError as e:
        print(f'timm-amf search: error: {e}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('timm-amf search: interrupted; the same command with --resume auto and its --experiment goes on',
              file=sys.stderr)
        return 128 + signal.SIGINT
    return 0
