"""The Visual Decathlon after training: predictions for the challenge's server, and the verb `timm-amf decathlon`.

The server takes one file for all domains, `[{"image_id": 10000001, "category_id": 10000042}, ...]`.
"""
import argparse
import json
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Optional, Union

import numpy as np
from timm.data import resolve_data_config

from timm_amf.data import Mixture, data_spec_from_args
from timm_amf.data.decathlon import (
    DOMAINS,
    DecathlonSource,
    channel_stats,
    decathlon_score,
    domain_name,
    open_domain,
)
from timm_amf.engine.opened import Opened, RunOptions, open_trained
from timm_amf.errors import UserError
from timm_amf.files import replacing
from timm_amf.yaml_text import load_yaml

__all__ = ['main', 'predict_run', 'write_results']


def predict_run(
        run: Union[str, Path],
        split: str = 'test',
        options: Optional[RunOptions] = None,
) -> tuple[str, list[dict[str, int]], Optional[float]]:
    """Rebuild a run from its folder and predict a split of its domain, in float32 and without augmentation.

    Args:
        run: Folder with `args.yaml` and the weights.
        split: `test` or `val`.
        options: `weights` last is right for a run that trained on the validation split too; `data_dir` is the folder
            `decathlon-1.0`.

    Returns:
        The domain; what the challenge's file has of each image, in the order of the annotations; and top-1 in percent,
        None where the labels are not known.
    """
    options = options or RunOptions()
    opened = open_trained(run, options)
    source = _open(opened.args, Path(run), options.data_dir, split)
    predicted = _predict(opened, source, options)
    accuracy = 100 * float((predicted == source.targets).mean()) if source.labelled else None
    rows = [
        {'image_id': image, 'category_id': source.category_ids[i]}
        for image, i in zip(source.image_ids, predicted.tolist(), strict=True)]
    return source.domain, rows, accuracy


def _open(args: argparse.Namespace, run: Path, data_dir: Optional[str], split: str) -> DecathlonSource:
    components = data_spec_from_args(args).components
    prefix, _, domain = components[0].dataset.partition('/')
    if len(components) > 1 or prefix.lower() != 'decathlon':
        raise UserError(f'{run}: was trained on {", ".join(c.dataset or c.name for c in components)}, not on one '
                        f'domain of the decathlon (dataset: decathlon/...)')
    if components[0].classes is not None:
        raise UserError(f'{run}: was trained on the first {components[0].classes} classes only')
    return open_domain(data_dir or components[0].root, domain, split, str(run))


def _predict(opened: Opened, source: DecathlonSource, options: RunOptions) -> np.ndarray:
    """Class index of each image, in the source's order."""
    count, classes = len(source), len(source.category_ids)
    model = opened.load(classes)
    channels = resolve_data_config(vars(opened.args), model=model, verbose=False)['input_size'][0]
    data = Mixture(
        [source.domain], source.classes, [(0, source, np.arange(count), source.targets)],
        input_img_mode='L' if channels == 1 else 'RGB')
    predicted = np.full(count, -1)
    for batch in opened.answers(model, data, options):
        # A model with more outputs than the domain has classes may not answer beyond them.
        predicted[batch.index.numpy()] = batch.log_probs[:, :classes].argmax(1).numpy()
    return predicted


def write_results(rows: Sequence[Mapping[str, int]], file: Union[str, Path]) -> None:
    """Write the file that the server takes: JSON, or if the name ends so a ZIP archive that holds `results.json`."""
    text = json.dumps(rows)
    with replacing(file, 'name another --out') as temporary:
        if Path(file).suffix.lower() == '.zip':
            with zipfile.ZipFile(temporary, 'w', zipfile.ZIP_DEFLATED) as archive:
                archive.writestr('results.json', text)
        else:
            temporary.write_text(text, encoding='utf-8')


# ---- the command


def main(args: argparse.Namespace) -> None:
    """Run `timm-amf decathlon score|submit|stats`."""
    {'score': _score, 'submit': _submit, 'stats': _stats}[args.verb](args)


def _score(args: argparse.Namespace) -> None:
    accuracies: dict[str, float] = {}
    for text in args.accuracies:
        for name, accuracy in _read_accuracies(text).items():
            if domain_name(name) in accuracies:
                raise UserError(f'two accuracies of {domain_name(name)}; give one')
            accuracies[domain_name(name)] = accuracy
    print(_score_table(accuracies))


def _read_accuracies(text: str) -> Mapping[str, float]:
    name, equals, value = text.partition('=')
    try:
        return {name: float(value)} if equals else load_yaml(text)
    except ValueError:
        raise UserError(f'{text}: {value!r} is not a number; write for example dtd=57.13') from None
    except UserError as e:
        raise UserError(f'{e}; give NAME=PERCENT, or a YAML file of such pairs') from None


def _score_table(accuracies: Mapping[str, float]) -> str:
    total, points = decathlon_score(accuracies)
    lines = [f'{"domain":16}{"accuracy":>9}{"points":>9}']
    lines += [f'{domain:16}{accuracies[domain]:>9.2f}{value:>9.1f}' for domain, value in points.items()]
    return '\n'.join([*lines, f'{"score":16}{"":9}{total:>9.1f}   of 10000{_without(points)}'])


def _without(domains: Collection[str]) -> str:
    missing = [domain for domain in DOMAINS if domain not in domains]
    return f', without {", ".join(missing)}' if missing else ''


def _submit(args: argparse.Namespace) -> None:
    options, rows, accuracies = RunOptions(**{name: getattr(args, name) for name in (
        'data_dir', 'weights', 'cpu', 'batch_size', 'workers')}), [], {}
    for run in args.runs:
        domain, found, accuracy = predict_run(run, args.split, options)
        if domain in accuracies:
            raise UserError(f'decathlon: two runs of {domain}; give one run a domain')
        print(f'{domain}: {len(found)} images{"" if accuracy is None else f", top-1 {accuracy:.2f} %"}')
        accuracies[domain] = accuracy
        rows += found
    write_results(rows, args.out)
    print(f'{args.out}: {len(rows)} predictions of {len(accuracies)} domains{_without(accuracies)}')
    if None not in accuracies.values():
        print(_score_table(accuracies))


def _stats(args: argparse.Namespace) -> None:
    for domain in args.domains:
        mean, std = channel_stats(open_domain(args.data_dir, domain, 'train'))
        numbers = [', '.join(f'{x:.4f}' for x in values) for values in (mean, std)]
        print(f'# {domain_name(domain)}\nmean: [{numbers[0]}]\nstd: [{numbers[1]}]')
