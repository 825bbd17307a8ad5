"""Figures as data: what a report draws, and what models with a policy have to show of it."""
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Optional

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .records import best_assignment

__all__ = ['Chart', 'Seen', 'route_charts', 'weight_charts']


@dataclass(frozen=True)
class Chart:
    """A figure: a table, and how it is drawn. The table is also its CSV file.

    Attributes:
        name: Of its files; unique in a report.
        title: What is shown.
        caption: How it is read.
        kind: `lines`, `dots` and `columns` over the first column, of numbers or names; `bars`, one below the other;
            `heat`, a matrix with the names of its rows in the first column; `points`, columns x, y, group and panel;
            `panels`, columns panel, group, position and value; `images`, columns group, image (its index in the data)
            and text.
        table: Columns of equal length. Beside a column NAME, `NAME_low` and `NAME_high` are limits of its values.
        series: The columns that are drawn; of none all but the first and limits.
        x: Label of the horizontal axis.
        y: Label of the vertical axis.
        range: Limits of the values; None leaves them to the values.
        log: The horizontal axis is logarithmic.
    """
    name: str
    title: str
    caption: str
    kind: str
    table: Mapping[str, Sequence]
    series: Sequence[str] = ()
    x: str = ''
    y: str = ''
    range: Optional[tuple[float, float]] = None
    log: bool = False

    @property
    def drawn(self) -> list[str]:
        """The columns that are drawn."""
        limits = {f'{name}_{end}' for name in self.table for end in ('low', 'high')}
        return list(self.series) or [name for name in list(self.table)[1:] if name not in limits]


@dataclass(frozen=True)
class Seen:
    """What there is to draw a model's own figures from.

    Attributes:
        history: Columns of `policy.csv`, a value an epoch, NaN where there is none.
        components: Names of the data's components.
        component_of: Component of each evaluated image, (N,) int64.
        decisions: What the model decided for each, (N, width); None where nothing was evaluated.
        texts: What to write below each image.
        samples: Gives evaluated images by index, as the model takes them, (B, C, H, W).
    """
    history: Mapping[str, Sequence[float]] = field(default_factory=dict)
    components: Sequence[str] = ()
    component_of: NDArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    decisions: Optional[NDArray] = None
    texts: Sequence[str] = ()
    samples: Optional[Callable[[Sequence[int]], Tensor]] = None

    def parts(self) -> list[tuple[str, NDArray]]:
        """Name and mask of each component that has evaluated images; of one component, of all images."""
        masks = [(name, self.component_of == i) for i, name in enumerate(self.components)]
        return [(name, mask) for name, mask in masks if mask.any()]

    def images(self, groups: Mapping[str, Sequence[int]], note: Callable[[int], str]) -> dict[str, list]:
        """The table of a chart of images."""
        rows = [(group, int(i), f'{self.texts[i]}; {note(i)}') for group, chosen in groups.items() for i in chosen]
        return dict(zip(('group', 'image', 'text'), map(list, zip(*rows))))


# -- of weights (AMF) -------------------------------------------------------------------------------------------------


def weight_charts(seen: Seen, features: Callable[[Tensor], Sequence[Tensor]]) -> list[Chart]:
    """What an AMF's policy learned.

    Args:
        seen: Its record and decisions: the weights (N, n).
        features: Gives of images the weighted features of each branch, n times (B, C_i).
    """
    found = _weights_over_training(seen)
    if seen.decisions is None or not len(seen.decisions):
        return found
    weights, branches = seen.decisions, range(seen.decisions.shape[1])
    means = {'component': [name for name, _ in seen.parts()]}
    for i in branches:
        of_parts = [weights[mask, i] for _, mask in seen.parts()]
        means[f'branch {i}'] = [float(w.mean()) for w in of_parts]
        for end, q in (('low', 25), ('high', 75)):
            means[f'branch {i}_{end}'] = [float(np.percentile(w, q)) for w in of_parts]
    found.append(Chart(
        'weights_by_component', 'Weights by component',
        'Mean weight of each branch; the whiskers hold the middle half of the images.', 'bars', means, x='weight',
        range=(0, 1)))
    surest = {f'branch {i}': np.argsort(-weights[:, i], kind='stable')[:8] for i in branches}
    surest = {name: [i for i in chosen if weights[i].argmax() == b] for b, (name, chosen) in enumerate(surest.items())}
    between = np.argsort(weights.max(1), kind='stable')[:8]
    found.append(Chart(
        'images_by_branch', 'Images by branch',
        'Those that each branch is given most surely, and last those that are most between.', 'images', seen.images(
            {**surest, 'between': between}, lambda i: f'weights {" ".join(f"{w:.2f}" for w in weights[i])}')))
    samples = list(dict.fromkeys([*(int(c) for s in surest.values() for c in s[:2]), int(between[0])]))[:6]
    if seen.samples is not None:
        found.append(_weighted_features(seen, samples, features))
    return found


def _weights_over_training(seen: Seen) -> list[Chart]:
    """AMF, Figures 6 and 7."""
    history, several = seen.history, len(seen.components) > 1
    branches = range(sum(name.startswith('weight_') for name in history))
    if not branches:
        return []
    epochs = {'epoch': history['epoch']}
    parts = list(seen.components) if several else ['']
    weights = {
        f'{part or "all"}, branch {i}': history[f'{part}_weight_{i}' if part else f'weight_{i}']
        for part in parts for i in branches}
    assigned = {name: [history[f'{name}_assigned_{i}'] for i in branches] for name in seen.components
                if f'{name}_assigned_0' in history}
    if several:
        votes = torch.tensor([[values[-1] for values in of_one] for of_one in assigned.values()])
        shares = {
            f'{seen.components[c]}, by branch {b}': assigned[seen.components[c]][b] for c, b in best_assignment(votes)}
    else:
        shares = {f'branch {i}': values for of_one in assigned.values() for i, values in enumerate(of_one)}
    shares = {name: [100 * value for value in values] for name, values in shares.items()}
    if several:
        shares['all'] = history['assignment_accuracy']
    charts = [Chart(
        'weights', 'Mean weight of each branch', 'Over the validation images, after each epoch (AMF, Figure 6).',
        'lines', {**epochs, **weights}, x='epoch', y='weight', range=(0, 1))]
    if assigned:
        charts.append(Chart(
            'assignment', 'Assignment of images to branches',
            'Percent of the images of a component whose largest weight is that of the branch matched to it (AMF, '
            'Figure 7).' if several else 'Percent of the images whose largest weight is that of a branch.', 'lines',
            {**epochs, **shares}, x='epoch', y='percent of images', range=(0, 100)))
    return charts


def _weighted_features(seen: Seen, samples: list[int], features: Callable, bins: int = 24) -> Chart:
    """AMF, Figure 2: each branch's features times its weight, averaged in magnitude over neighbouring ones."""
    rows = []
    of_branches = features(seen.samples(samples))
    for k, image in enumerate(samples):
        for i, part in enumerate(of_branches):
            chunks = part[k].float().abs().cpu().tensor_split(min(bins, part.shape[1]))
            name = f'{k + 1}: {seen.texts[image].partition(",")[0]}'
            rows += [(name, f'branch {i}', len(chunks) * i + j, float(c.mean())) for j, c in enumerate(chunks)]
    table = dict(zip(('panel', 'group', 'position', 'value'), map(list, zip(*rows))))
    return Chart(
        'weighted_features', 'Weighted features of single images',
        f'Mean magnitude of the features of each branch times its weight, in {bins} runs of neighbouring features a '
        'branch (AMF, Figure 2): of images that a branch is given most surely, and of one between.', 'panels', table,
        x='features, branch by branch', y='magnitude')


# -- of routes (SpotTune) ---------------------------------------------------------------------------------------------


def route_charts(seen: Seen) -> list[Chart]:
    """What a SpotTune's policy learned; decisions are the tuned blocks and their probabilities, (N, 2 blocks)."""
    found = []
    if 'tuned_blocks' in seen.history:
        found.append(Chart(
            'tuned_blocks', 'Tuned blocks of an image', 'Mean over the validation images, after each epoch.', 'lines',
            {'epoch': seen.history['epoch'], 'mean': seen.history['tuned_blocks']}, x='epoch', y='blocks'))
    if seen.decisions is None or not len(seen.decisions):
        return found
    routes = seen.decisions[:, :seen.decisions.shape[1] // 2]
    blocks, counts = routes.shape[1], routes.sum(1).round().astype(int)
    numbers = list(range(blocks))
    shares = {name: (100 * routes[mask].mean(0)).tolist() for name, mask in seen.parts()}
    likely = (100 * seen.decisions[:, blocks:].mean(0)).tolist()
    found.append(Chart(
        'blocks', 'Images by block', 'Percent of the images that take the tuned copy of a block, from the input to the '
        "output (SpotTune, Figure 3), and the policy's mean probability of it.", 'columns',
        {'block': numbers, **shares, 'probability': likely}, x='block', y='percent', range=(0, 100)))
    histogram = {name: np.bincount(counts[mask], minlength=blocks + 1).tolist() for name, mask in seen.parts()}
    found.append(Chart(
        'images_by_tuned_blocks', 'Tuned blocks an image', 'Number of images that take so many tuned blocks (SpotTune, '
        'Figure 4).', 'columns', {'tuned blocks': list(range(blocks + 1)), **histogram}, x='tuned blocks', y='images'))
    order = np.argsort(counts, kind='stable')
    half = min(8, -(-len(order) // 2))
    found.append(Chart(
        'images_by_route', 'Images with few and with many tuned blocks', 'SpotTune, Figure 5.', 'images', seen.images(
            {'fewest': order[:half], 'most': order[::-1][:min(half, len(order) - half)]},
            lambda i: f'{counts[i]} of {blocks} blocks tuned')))
    return found
