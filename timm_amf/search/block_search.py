"""`timm-amf search`: find the layers, blocks or windows that are worth tuning (the block-wise paper).

    timm-amf search DIR --model resnet50
    timm-amf search DIR --model resnet50 --ways layer block window top3 top5
    timm-amf train --config RUN/best.yaml

It takes the flags of train_amf.py, so the search is for the run that these name.
"""
import argparse
import contextlib
import copy
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from timm.data import resolve_data_config
from torch import nn

from timm_amf.data import Mixture
from timm_amf.engine import build
from timm_amf.engine.head import start_head
from timm_amf.engine.options import keyword_words, parse_args, save_args
from timm_amf.engine.run import claim_folder, write_environment
from timm_amf.errors import UserError
from timm_amf.files import write_text
from timm_amf.flags import words_of
from timm_amf.models.blocks import in_eval
from timm_amf.parsers import PARSERS
from timm_amf.report import check_installed, report
from timm_amf.search.candidates import (
    Candidate,
    Traced,
    baseline_candidates,
    candidate_plan,
    layer_candidates,
    random_candidate,
    top_candidate,
    window_candidates,
)
from timm_amf.search.charts import search_charts, write_figure
from timm_amf.search.proposal import config_text
from timm_amf.search.results import BASELINES, CandidateResult, SearchResults, ranking, summary, write_csv
from timm_amf.search.training import CandidateRuns, Stage
from timm_amf.text import columns, differences
from timm_amf.tuning import Plan, Schedule, model_roles, plan_from_args
from timm_amf.tuning.plan_args import common_plan, resolve_lr
from timm_amf.tuning.resolve import resolve
from timm_amf.tuning.roles import role_blocks

__all__ = ['BlockSearch', 'Search', 'main', 'search_blocks']

# Of train_amf.py: what a search cannot train with, and what candidates do without.
_REFUSED = ('jsd_loss', 'aug_splits', 'split_bn', 'global_k', 'torchcompile', 'dry_run', 'eval_only')
_LEFT_OUT = ('model_ema', 'branch_loss', 'policy_balance')
_ANYWHERE = ('overwrite', 'resume', 'no_progress', 'workers', 'explicit', 'config', 'output', 'experiment', 'report')


# -- flags ------------------------------------------------------------------------------------------------------------


def _check(own: argparse.Namespace, args: argparse.Namespace) -> None:
    """Refuse what a search cannot have, and set what follows from the flags."""
    if 'model' not in args.explicit:
        raise UserError('no model: name one with --model, or a recipe with --config')
    for name in _REFUSED:
        if getattr(args, name):
            raise UserError(f'--{name.replace("_", "-")}: a search cannot train with it; leave it out of the search')
    if args.resume not in ('', 'auto') or args.resume and not args.experiment:
        raise UserError(f'--resume {args.resume}: give auto, and the --output and --experiment of the search')
    if args.report:
        check_installed()
    if not args.initial_checkpoint and not args.pretrained:
        args.pretrained = True
        args.explicit.add('pretrained')
    own.search_epochs = own.search_epochs or min(10, common_plan(args).epochs)


# -- the search -------------------------------------------------------------------------------------------------------


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
    notes: list[str]
    folder: Path

    @property
    def best(self) -> CandidateResult:
        """The best candidate, a baseline if that is better than all."""
        return self.results.winner()

    def __str__(self) -> str:
        rows = ranking(self.results, limit=5)
        tables = [columns(rows, right=(0, 3, 6)), columns(summary(self.results), right=(1, 3, 5, 6, 7))]
        if len(rows) <= len(self.results.results):
            tables[0] += f'\nand {len(self.results.results) - len(rows) + 1} more, beyond the first 5 of each way'
        return '\n\n'.join([*(f'{self.results.title}\n{table}' for table in tables), *self.notes])

    def to_yaml(self, path: Union[str, Path]) -> None:
        """Write the file for `train_amf.py --config`, whole or not at all."""
        write_text(path, self.config)


class Search:
    """A search.

    Args:
        own: Its flags.
        args: Those of train_amf.py.
        progress: Show bars and the trainer's lines.

    Attributes:
        accelerator: Accelerate's context.
        folder: Where its files go.
    """

    def __init__(self, own: argparse.Namespace, args: argparse.Namespace, progress: bool):
        _check(own, args)
        self.own, self.args = own, args
        untracked = argparse.Namespace(**{**vars(args), 'tracker': ['none'], 'log_wandb': False})
        self.accelerator = build.build_accelerator(untracked)
        self.progress = progress and not args.no_progress and self.accelerator.is_local_main_process
        left_out = [f'--{n.replace("_", "-")}' for n in _LEFT_OUT if getattr(args, n)]
        self.notes = [f'Candidates were trained without {", ".join(left_out)}.'] if left_out else []
        self.started = time.monotonic()
        # Not args.output's default, where runs are.
        named = argparse.Namespace(**{**vars(args), 'output': args.output or 'output/search'})
        self.folder = build.run_folder(named, self.accelerator)

    def run(self) -> BlockSearch:
        main = self.accelerator.is_main_process
        with claim_folder(self.folder, True, None, 'search') if main else contextlib.nullcontext():
            return self._run()

    def _run(self) -> BlockSearch:
        own, args = self.own, self.args
        search, final, val = self._open_data()
        model, plan = self._build_model(search)
        self.input_size = resolve_data_config(vars(args), model=model, verbose=False)['input_size']
        found, layers, traced = self._candidates(model)
        candidates = self._runs(traced, plan, search.num_classes)
        self._prepare_folder()
        if (self.folder / 'results.json').exists():  # nothing is left to do
            return self._finish(SearchResults.read(self.folder / 'results.json'), plan)
        self._keep_chunks(candidates)
        results = SearchResults(args.model, self.role, args.seed, search.num_classes, len(search))
        with self._stage(model, 'search', search, val, _shorter(plan, own.search_epochs)) as stage:
            results.results = candidates.run(found, stage)
            accuracies = {r.candidate.name: r.top1 for r in results.of_way('layer')}
            tops = [top_candidate(layers, accuracies, number) for number in self.tops.values()]
            results.results += candidates.run(tops, dataclasses.replace(stage, name='top'))
        if final is not None:
            chosen = [results.winner(way).candidate for way in (*BASELINES, *results.ways)]
            results.final_images = len(final)
            with self._stage(model, 'final', final, val, plan) as stage:
                results.final = candidates.run(chosen, stage)
        results.seconds = time.monotonic() - self.started
        if candidates.alone:
            self.notes.append(f'Candidates were trained one after the other: {candidates.alone}.')
        return self._finish(results, plan)

    def _open_data(self) -> tuple[Mixture, Optional[Mixture], Mixture]:
        """Images for the search, for training its winners (or None), and for validation."""
        own, seed = self.own, self.args.seed
        train, val = build.build_data(self.args, self.accelerator)
        if own.final_share and own.search_share + own.final_share <= 1:
            return (*_stratified(train, [own.search_share, own.final_share], seed), val)
        search, final = (
            _stratified(train, [share], seed + i)[0] if 0 < share < 1 else train
            for i, share in enumerate((own.search_share, own.final_share)))
        return search, final if own.final_share else None, val

    def _build_model(self, images: Mixture) -> tuple[nn.Module, Plan]:
        args, num_classes = self.args, images.num_classes
        model = build.place_model(build.build_model(args, num_classes), args, self.accelerator)
        roles = model_roles(model)
        self.role = self.own.search_role or next((r for r in roles if r not in ('head', 'policy')), '')
        if self.role not in roles or not role_blocks(model, self.role):
            raise UserError(f'--search-role {self.role}: the model has no blocks there; it has {", ".join(roles)}')
        lr = resolve_lr(args, args.batch_size * self.accelerator.num_processes * args.grad_accum_steps)
        plan = plan_from_args(args, roles, lr)
        if plan.role('head').train == 'none':
            raise UserError('plan: the classifier must train in a search; leave the train of role head out')
        for name in (self.role, 'head'):
            if plan.role(name).start_epoch:
                raise UserError(f'plan: role {name} must train from the start in a search; leave its start_epoch out')
        table = resolve(model, plan)
        build.set_start(model, table, args, num_classes)
        done = args.resume and not args.overwrite and (self.folder / 'results.json').exists()
        if self.own.search_head == 'own' and not done:  # else nothing is left to train
            start_head(model, args, images, self.accelerator, table)
        for other in roles:
            if other not in (self.role, 'head'):
                plan = plan.with_role(other, train='none')
        return model, plan

    def _candidates(self, model: nn.Module) -> tuple[list[Candidate], list, Traced]:
        """Both baselines and the candidates of all ways but the tops, which wait for the layers; these; the network."""
        own = self.own
        try:
            traced = Traced(model, self.input_size, own.search_head == 'mlp')
        except (AssertionError, RuntimeError, ValueError) as e:  # whatever an architecture makes of another size
            size, cause = 'x'.join(map(str, self.input_size)), (str(e) or repr(e)).splitlines()[0]
            raise UserError(
                f'--img-size: {self.args.model} takes no images of {size} ({cause}); give another, '
                f'or --model-kwargs img_size={self.input_size[-1]} if it is built for a size') from e
        found, layers = baseline_candidates(), traced.layers(self.role, own.separate_norms)
        numbers = {way: int(way[6:]) for way in own.ways if way.startswith('random')}
        self.tops = {way: int(way[3:]) for way in own.ways if way.startswith('top')}
        for way, number in {**numbers, **self.tops}.items():
            if number > len(layers):
                raise UserError(f'--ways {way}: the model has {len(layers)} layers')
        if self.tops or 'layer' in own.ways:
            found += layer_candidates(layers)
        if 'block' in own.ways:
            found += traced.blocks(self.role, own.cut)
        if 'window' in own.ways:
            found += window_candidates(layers, own.window)
        found += [random_candidate(layers, number, self.args.seed) for number in numbers.values()]
        return found, layers, traced

    def _runs(self, traced: Traced, plan: Plan, num_classes: int) -> CandidateRuns:
        own, args = self.own, self.args
        reasons = {
            'as asked for': own.one_by_one, 'they are in a branch of a composite': self.role != 'backbone',
            f'{plan.opt} scales by the gradients of all parameters': 'lamb' in plan.opt.lower()}
        head = _mlp_head(traced.model, self.input_size, num_classes, args.seed) if own.search_head == 'mlp' else None
        memory = own.memory * 2**30 if own.memory else _free_memory(self.accelerator) / 2
        return CandidateRuns(
            traced, self.role, args, self.accelerator, self.folder / 'state', head,
            next((reason for reason, holds in reasons.items() if holds), ''), own.chunk, memory, self.progress)

    @contextlib.contextmanager
    def _stage(self, model: nn.Module, name: str, train: Mixture, val: Mixture, plan: Plan):
        # Copies, since loaders give them a cache, after which no share of them can be taken.
        loaders = build.build_loaders(self.args, model, copy.copy(train), copy.copy(val), self.accelerator)
        try:
            yield Stage(name, *loaders, plan)
        finally:
            for loader in loaders:
                loader.close()

    def _keep_chunks(self, candidates: CandidateRuns) -> None:
        """Cut what goes on into the chunks of its first start: how much memory is free changes."""
        path = self.folder / 'state' / 'chunks.yaml'
        limits = [candidates.chunk, candidates.memory]
        if self.accelerator.is_main_process:
            if path.exists():
                limits = yaml.safe_load(path.read_text(encoding='utf-8'))
            else:
                write_text(path, yaml.safe_dump(limits))
        # Of the main process: less may be free where another one runs.
        candidates.chunk, candidates.memory = broadcast_object_list(limits)
        own = self.own
        if own.chunk not in (None, candidates.chunk) or own.memory not in (None, candidates.memory / 2**30):
            raise UserError(
                f'{self.folder}: --chunk and --memory stay as they were; leave them out, or add --overwrite')

    # -- files --------------------------------------------------------------------------------------------------------

    def _prepare_folder(self) -> None:
        """Make the folder, or find that it holds this search, which goes on."""
        args, path = self.args, self.folder / 'search.yaml'
        values = {k: v for k, v in vars(args).items() if k not in _ANYWHERE} | {'report': False}
        flags = {k: v for k, v in vars(self.own).items() if k not in ('chunk', 'memory', 'help', 'words')}
        # What the results follow from.
        identity = json.dumps({**flags, **values}, indent=1, sort_keys=True, default=str)
        if self.accelerator.is_main_process:
            if path.exists() and not args.overwrite:
                if not args.resume:
                    raise UserError(
                        f'{self.folder}: holds a search already; go on with --resume auto, or add --overwrite')
                now, before = json.loads(identity), json.loads(path.read_text(encoding='utf-8'))
                differing = differences({**dict.fromkeys(now), **before}, {**dict.fromkeys(before), **now})
                if differing:
                    raise UserError(f'{self.folder}: holds a search with other settings ({"; ".join(differing)}); give '
                                    'the same ones, or add --overwrite')
            elif args.overwrite:
                shutil.rmtree(self.folder / 'state', ignore_errors=True)
                (self.folder / 'results.json').unlink(missing_ok=True)
            (self.folder / 'state').mkdir(parents=True, exist_ok=True)
            write_text(path, identity)
            save_args(args, self.folder / 'args.yaml')
            write_environment(self.folder, self.accelerator)
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
            self.notes += write_figure(search_charts(results), self.folder / 'search.png')
            shutil.rmtree(self.folder / 'state', ignore_errors=True)
            if self.args.report:
                self.notes.append(f'Report: {report([self.folder])}')
        return found


def _stratified(dataset: Mixture, shares: Sequence[float], seed: int) -> list[Mixture]:
    """Disjoint parts of a data set, drawn class by class; what the shares leave is in none.

    A part of each class has its share of the images, rounded, and one at least.
    """
    parts: list[list[np.ndarray]] = []
    for number in range(dataset.num_classes):
        members = np.flatnonzero(dataset.targets == number)
        if len(members) < len(shares):
            raise UserError(
                f'data: class {dataset.class_names[number]!r} has {len(members)} images, too few for {len(shares)} '
                f'parts; add images, or search without shares')
        ends = [0]
        for left, end in zip(range(len(shares) - 1, -1, -1), np.cumsum(shares)):
            ends.append(min(max(round(float(end) * len(members)), ends[-1] + 1), len(members) - left))
        drawn = np.random.RandomState((seed + 7919 * number) % 2**32).permutation(members)
        parts.append(np.split(drawn, ends)[1:-1])
    return [dataset.subset(np.sort(np.concatenate(part))) for part in zip(*parts)]


def _mlp_head(model: nn.Module, input_size: Sequence[int], num_classes: int, seed: int) -> nn.Module:
    """The paper's classifier: flatten, 128 units, dropout of 0.5, 64 units with ReLU, and classes (section V).

    On the features before pooling. The paper gives no activation of the first layer, so it has none, as is the default
    of its library, whose initialisation is used too (Glorot's uniform one).
    """
    first = next(model.parameters())
    with in_eval(model), torch.no_grad():  # else norms would take this image for data
        width = model.forward_features(first.new_zeros((1, *input_size))).numel()
    with torch.random.fork_rng():
        build.seed_step(seed, 0, 0, 0)
        head = nn.Sequential(
            nn.Flatten(), nn.Linear(width, 128), nn.Dropout(0.5), nn.Linear(128, 64), nn.ReLU(),
            nn.Linear(64, num_classes))
        for param in head.parameters():
            nn.init.xavier_uniform_(param) if param.ndim > 1 else nn.init.zeros_(param)
    return head.to(device=first.device, dtype=first.dtype)


def _shorter(plan: Plan, epochs: int) -> Plan:
    """A Plan for fewer epochs, its schedules compressed to fit."""
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


def _free_memory(accelerator: Accelerator) -> float:
    """Bytes."""
    if accelerator.device.type == 'cuda':
        return float(torch.cuda.mem_get_info(accelerator.device)[0])
    try:
        return float(os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'))
    except (ValueError, OSError, AttributeError):  # not on every system
        return 4. * 2**30


def search_blocks(
        model: Optional[str] = None,
        data_dir: Union[str, Path, None] = None,
        config: Union[str, Path, None] = None,
        ways: Union[str, Sequence[str], None] = None,
        progress: bool = True,
        **options: Any,
) -> BlockSearch:
    """Find the layers, blocks or windows of layers that are worth tuning (Algorithms 1 and 2 of the block-wise paper).

    Args:
        model: timm model, or a composite.
        data_dir: Folder of the data; other data are among the options, or a mapping `data` of the recipe's form.
        config: Recipe or YAML file that sets options; those given here win.
        ways: What to choose from: `layer`, `block`, `window`, and `topK` such as `top3`. `block` without it.
        progress: Show a bar.
        **options: Flags of `timm-amf search` and of `train_amf.py` by name.

    Returns:
        Results, Plan and the file for `train_amf.py`; `print` shows tables.
    """
    parser = PARSERS['search']()
    known = {action.dest for action in parser._actions} - {'help'}
    own = {name: value for name, value in options.items() if name in known}
    if ways is not None:
        own['ways'] = [ways] if isinstance(ways, str) else ways
    rest = {name: value for name, value in options.items() if name not in known}
    args = parse_args(*keyword_words(dict(rest, config=config, model=model, data_dir=data_dir)))
    with torch.random.fork_rng():
        return Search(parser.parse_args(words_of(parser, own)), args, progress).run()


def main(own: argparse.Namespace) -> None:
    """`timm-amf search`: print the tables, write the files."""
    search = Search(own, parse_args(own.words), progress=True)
    found = search.run()
    if search.accelerator.is_main_process:
        print(found)
        print(f'\nRun it: timm-amf train --config {found.folder / "best.yaml"}')
