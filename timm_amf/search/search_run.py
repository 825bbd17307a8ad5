"""One block-wise search, from its options to its files."""
import argparse
import copy
import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from timm.data import resolve_data_config
from torch import nn

from timm_amf.data import Mixture, create_dataset, data_spec_from_args, splits_from_args
from timm_amf.data.check import check_images
from timm_amf.engine import build
from timm_amf.engine.options import resolve_lr, save_args
from timm_amf.errors import UserError
from timm_amf.files import replacing
from timm_amf.search.block_tables import ranking, summary, write_csv
from timm_amf.search.candidates import (
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
from timm_amf.search.search_flags import LEFT_OUT, PAPER_SHARES, WAYS
from timm_amf.search.shares import Fit, fit_budget, stratified
from timm_amf.tuning import Plan, Schedule, model_roles, plan_from_args
from timm_amf.tuning.plan_args import common_plan
from timm_amf.tuning.roles import role_blocks

__all__ = ['BlockSearch', 'Search']

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
        with replacing(path, 'choose another folder') as temporary:
            temporary.write_text(self.config, encoding='utf-8')


class Search:
    """A search.

    Args:
        own: Its flags.
        args: Those of train_amf.py.
        progress: Show bars.

    Attributes:
        accelerator: Accelerate's context.
        folder: Where its files go.
    """

    def __init__(self, own: argparse.Namespace, args: argparse.Namespace, progress: bool):
        self.own, self.args = own, args
        self.accelerator = build.build_accelerator(argparse.Namespace(
            **{**vars(args), 'tracker': ['none'], 'log_wandb': False}))
        self.progress = progress and not args.no_progress and self.accelerator.is_local_main_process
        left_out = [f'--{n.replace("_", "-")}' for n in LEFT_OUT if getattr(args, n)]
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
            search, final, val = stratified(pool, list(PAPER_SHARES.values()), args.seed)
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
            fit = fit_budget(own.budget * 60, len(train), len(val), *costs, common_plan(args).epochs, min(1., least))
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
