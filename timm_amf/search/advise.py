"""`timm-amf advise`: measure how well pretrained weights fit the data, and propose a Plan by the paper's Table 7.

    timm-amf advise DIR --model resnet50
    timm-amf advise --config amf.yaml --random-init 30 --advice-file plan.yaml
    timm-amf advise DIR --models resnet50,convnext_tiny,vit_small_patch16_224
    train_amf.py --config advice.yaml

It takes the flags of train_amf.py, so the advice is for the run that these name.
"""
import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import yaml

from timm_amf.data import DataSpec, Mixture, create_dataset, data_spec_from_args
from timm_amf.engine import build
from timm_amf.engine.config_file import find_config
from timm_amf.engine.options import parse_args
from timm_amf.errors import UserError
from timm_amf.files import replacing
from timm_amf.search.features import FeatureNet, Features, extract_features
from timm_amf.search.measure import RANKING, Measures, measure
from timm_amf.search.networks import Target, read_target
from timm_amf.search.proposal import propose
from timm_amf.search.random_init import random_init_accuracy
from timm_amf.search.rules import Decision, decide
from timm_amf.search.tables import component_table, plan_table, ranking_table
from timm_amf.search.transferability import class_means
from timm_amf.tuning import Plan
from timm_amf.verbs import VerbParser, run_verb

__all__ = ['Advice', 'ComponentAdvice', 'advise', 'main']

_logger = logging.getLogger(__name__)


@dataclass
class ComponentAdvice:
    """What is known of one component of the data under one network.

    Attributes:
        name: The component.
        network: The network.
        measures: What was measured.
        decision: The side of Table 7 that it is on.
    """
    name: str
    network: str
    measures: Measures
    decision: Decision


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
        parts = [component_table(c.name, c.network, c.measures, c.decision) for c in self.components]
        if self.ranking:
            parts.insert(0, ranking_table(self.ranking))
        parts.append(plan_table(self.model, self.plan, {role: c.name for role, c in self.roles.items()}))
        return '\n\n'.join([*parts, *self.notes])

    def to_yaml(self, path: Union[str, Path]) -> None:
        """Write the file for `train_amf.py --config`, whole or not at all.

        Raises:
            UserError: If it cannot be written.
        """
        with replacing(path, 'choose another --advice-file') as temporary:
            temporary.write_text(self.config, encoding='utf-8')


def _own_parser() -> argparse.ArgumentParser:
    parser = VerbParser(
        prog='timm-amf advise', add_help=False, allow_abbrev=False,
        usage='%(prog)s [DIR] --model NAME [flags of train_amf.py] [flags below]',
        description='Measure how well pretrained weights fit the data, and propose a Plan for train_amf.py.')
    add = parser.add_argument
    add('-h', '--help', action='store_true', help='show this; timm-amf train --help shows the flags of train_amf.py')
    add('--models', metavar='A,B=FILE,...', help='rank these backbones (=FILE: of these weights), and advise the best')
    add('--source-dir', metavar='DIR', help='folder of images of the source data by class, for the EMD similarity')
    add('--random-init', type=int, default=0, metavar='EPOCHS',
        help="train the network from random weights, too: the paper's best measure, and dear")
    add('--no-source-classifier', action='store_true', help='the weights hold no classifier: leave LEEP and NCE out')
    add('--policy', metavar='NAME', help='policy network of an AMF that is proposed for a plain model; none: MultiTune')
    add('--advice-file', default='advice.yaml', metavar='FILE',
        help='file that train_amf.py --config runs (default: %(default)s); --overwrite replaces it')
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


def _run(argv: Sequence[str], progress: bool = True) -> Advice:
    """Advice for a command line."""
    own, rest = _own_parser().parse_known_args(argv)
    models = _split_models(own.models)
    if own.random_init < 0:
        raise UserError(f'--random-init: must be at least 0, not {own.random_init}')
    named = [['--model', name, *(['--pretrained-path', file] if file else [])] for name, file in models]
    runs = [parse_args([*rest, *extra]) for extra in named or [[]]]
    if 'model' not in runs[0].explicit:
        raise UserError('no model: name one with --model, several with --models, or a recipe with --config')
    for args in runs:
        if not args.initial_checkpoint:
            args.pretrained = True
            args.explicit.add('pretrained')
    accelerator = build.build_accelerator(_quiet(runs[0]))
    if accelerator.num_processes > 1:
        raise UserError('advise runs in one process; start it without accelerate launch or torchrun')
    train, val = build.build_data(runs[0], accelerator)
    found = []
    for args in runs:
        target = read_target(args, train.num_classes)
        found.append((args, target, _measure_networks(args, target, own, train, val, accelerator, progress)))
    ranking = _rank([(args.model, advices[0]) for args, _, advices in found]) if models else []
    best = ranking[0][0] if ranking else runs[0].model
    args, target, advices = next(entry for entry in found if entry[0].model == best)
    proposal = propose(args, target, advices, train.num_classes, own.policy)
    components = list({(c.network, c.name): c for network in advices for c in network}.values())
    if models:
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
    for plain in target.networks:
        key = repr((plain.model, plain.model_kwargs, plain.pretrained_cfg_overlay, plain.pretrained_path))
        if key not in done:
            done[key] = _measure_network(plain, own, train, val, accelerator, progress and not args.no_progress)
        result.append(done[key])
    return result


def _measure_network(
        plain: argparse.Namespace,
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
        scratch = None
        if own.random_init:
            single = DataSpec(**{**vars(spec), 'components': (spec.components[index],)})
            scratch = _announced(random_init_accuracy, net.name, name, plain, single, own.random_init)
        try:
            measures = measure(features, evaluation, train.class_names, source, scratch)
        except UserError as e:
            raise UserError(f'data component {name!r}: {e}') from e
        advices.append(ComponentAdvice(name, net.name, measures, decide(measures.values)))
    return advices


def _announced(train, network: str, component: str, *args):
    def run() -> tuple[float, float]:
        print(f'Training {network} from random weights on {component}.', file=sys.stderr)
        return train(*args)
    return run


def _source_means(net: FeatureNet, folder: str, progress: bool) -> tuple[np.ndarray, np.ndarray]:
    spec = DataSpec.from_mapping({'path': folder, 'name': 'source'})
    source = create_dataset(spec, 'train', in_chans=net.in_chans)
    features: Features = extract_features(net, source, net.args.cache_dir, progress, f'{net.name}: source features')
    return class_means(features.pooled.astype(np.float64), features.labels)


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


def advise(
        model: Optional[str] = None,
        data_dir: Union[str, Path, None] = None,
        config: Union[str, Path, None] = None,
        models: Union[str, Sequence[str], None] = None,
        source_dir: Union[str, Path, None] = None,
        random_init: int = 0,
        source_classifier: bool = True,
        policy: Optional[str] = None,
        progress: bool = True,
        **options,
) -> Advice:
    """Measure how well pretrained weights fit the data, and propose a Plan by Table 7 of the non-binary paper.

    Args:
        model: timm model, or an AMF or MultiTune.
        data_dir: Folder of the data; other data are among the options, or a section `data` of the recipe's form.
        config: Recipe or YAML file that sets options; those given here win.
        models: Backbones to rank, each a name or `name=file of weights`; the Plan is for the best.
        source_dir: Folder of images of the source data by class, for the EMD domain similarity.
        random_init: Epochs of training from random weights, 0 for none.
        source_classifier: The weights hold the classifier of the source data.
        policy: Policy network of an AMF that is proposed for a plain model; `none` for MultiTune.
        progress: Show bars.
        **options: Flags of `train_amf.py` by name, and `data`, a mapping.

    Returns:
        Measures, advice and Plan; `print` shows them as tables and `to_yaml` writes what `train_amf.py` runs.

    Raises:
        UserError: On a mistake in options or data.
    """
    content: dict[str, Any] = {}
    if config is not None:
        content = yaml.safe_load(find_config(str(config)).read_text(encoding='utf-8')) or {}
        if not isinstance(content, Mapping):
            raise UserError(f'{config}: must hold keys and values')
        content = {k: v for k, v in content.items() if k != 'explicit'}
    content.update({k: v for k, v in options.items() if v is not None})
    content.update({k: str(v) for k, v in dict(model=model, data_dir=data_dir).items() if v is not None})
    models = ','.join(models) if models is not None and not isinstance(models, str) else models
    flags = {'--models': models, '--source-dir': source_dir, '--random-init': random_init, '--policy': policy}
    argv = [text for flag, value in flags.items() if value for text in (flag, str(value))]
    argv += [] if source_classifier else ['--no-source-classifier']
    with tempfile.TemporaryDirectory(prefix='timm_amf-') as folder:
        path = Path(folder) / 'options.yaml'
        path.write_text(yaml.safe_dump(content), encoding='utf-8')
        try:
            return _run(['--config', str(path), *argv], progress)
        except UserError as e:
            raise UserError(str(e).replace(str(path), 'advise')) from e.__cause__


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The verb `advise`: print the tables, write the file. Returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format='%(levelname)s: %(message)s')
    argv = list(sys.argv[1:] if argv is None else argv)
    return run_verb(
        'timm-amf advise', lambda: _advise(argv), 'interrupted; features that were finished are kept')


def _advise(argv: Sequence[str]) -> None:
    own, _ = _own_parser().parse_known_args(argv)
    if own.help:
        _own_parser().print_help()
        return
    if os.path.exists(own.advice_file) and '--overwrite' not in argv:
        raise UserError(f'{own.advice_file} exists; add --overwrite, or name another with --advice-file')
    advice = _run(argv)
    advice.to_yaml(own.advice_file)
    print(advice)
    print(f'\nRun it: train_amf.py --config {own.advice_file}')
