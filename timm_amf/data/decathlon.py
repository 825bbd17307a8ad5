"""The Visual Domain Decathlon: its ten domains, its folders and annotation files, and its score.

The challenge (Rebuffi et al., "Learning multiple visual domains with residual adapters", NIPS 2017, section 4;
robots.ox.ac.uk/~vgg/decathlon) distributes images of a short side of 72 pixels and annotations in the manner of COCO:

    decathlon-1.0/annotations/aircraft_train.json, aircraft_val.json, aircraft_test_stripped.json
    decathlon-1.0/data/aircraft/train/0001/000001.jpg
"""
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Optional

import numpy as np

from timm_amf.errors import UserError

from .sources import FileSource, Source, errors_of, first_line, read_image
from .spec import split_of

__all__ = [
    'DOMAINS', 'DecathlonSource', 'Domain', 'channel_stats', 'decathlon_score', 'domain_name', 'open_domain',
]


class Domain(NamedTuple):
    """What is known of a domain.

    Args:
        column: Its name in the papers' tables.
        baseline: Test accuracy (percent) of the network that is fine-tuned as a whole, which sets the scale of the
            score: the row "Finetune" of Rebuffi et al. 2017, Table 1, whose score is 2500 by construction.
    """
    column: str
    baseline: float


# In the order of the papers' tables.
DOMAINS = {
    'imagenet12': Domain('ImNet', 59.87),
    'aircraft': Domain('Airc.', 60.34),
    'cifar100': Domain('C100', 82.12),
    'daimlerpedcls': Domain('DPed', 92.82),
    'dtd': Domain('DTD', 55.53),
    'gtsrb': Domain('GTSR', 97.53),
    'vgg-flowers': Domain('Flwr', 81.41),
    'omniglot': Domain('OGlt', 87.69),
    'svhn': Domain('SVHN', 96.55),
    'ucf101': Domain('UCF', 51.20),
}


def domain_name(name: str) -> str:
    """The challenge's name of a domain that is called so, or as in the papers' tables."""
    plain = name.lower().rstrip('.')
    for domain, about in DOMAINS.items():
        if plain in (domain, about.column.lower().rstrip('.')):
            return domain
    raise UserError(f'decathlon: unknown domain {name!r}; there are {", ".join(DOMAINS)}')


# ---- the score


def decathlon_score(accuracies: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """The challenge's score, S = sum of 1000 (max(0, Emax - E) / Emax)^2 over the domains (Rebuffi et al. 2017, section
    4; SpotTune, section 4.1), where E is the test error and Emax twice the error of the baseline.

    Args:
        accuracies: Domain -> test accuracy in percent. A domain that is left out earns nothing.

    Returns:
        The score, between 0 and 10000, and the points of each domain, between 0 and 1000.
    """
    points = {}
    for name, accuracy in accuracies.items():
        domain = domain_name(name)
        if domain in points:
            raise UserError(f'decathlon: two accuracies of {domain}; give one')
        if isinstance(accuracy, bool) or not isinstance(accuracy, (int, float)) or not 0 <= accuracy <= 100:
            raise UserError(f'decathlon: the accuracy of {domain} must be a percentage (0 to 100), not {accuracy!r}')
        worst = 2 * (100 - DOMAINS[domain].baseline)
        points[domain] = 1000 * (max(0., worst - (100 - accuracy)) / worst) ** 2
    points = {domain: points[domain] for domain in DOMAINS if domain in points}
    return sum(points.values()), points


# ---- folders and annotation files


class DecathlonSource(FileSource):
    """One split of one domain.

    Attributes:
        domain: Name of the domain.
        image_ids: The challenge's id of each image.
        category_ids: The challenge's id of each class.
        labelled: Whether the targets are known; else they are all -1.
    """

    def __init__(
            self,
            domain: str,
            categories: dict[int, str],
            images: dict[int, Path],
            targets: Optional[list[int]],
    ):
        super().__init__(categories.values(), targets or [-1] * len(images), images.values())
        self.domain = domain
        self.category_ids = list(categories)
        self.image_ids = list(images)
        self.labelled = targets is not None


def open_domain(root: Optional[str], domain: str, split: str, where: str = 'decathlon') -> DecathlonSource:
    """Open a split of a domain of the challenge.

    The classes are the categories of the training annotations by ascending id, as the challenge's own code has them.
    For `test` a file `<domain>_test.json` with labels is taken where there is one, else `<domain>_test_stripped.json`,
    which has none.

    Args:
        root: The folder `decathlon-1.0`, or the one that holds it.
        domain: Name of the domain.
        split: `train`, `val` or `test`, or one of timm's synonyms.
        where: Whose data these are, for messages.
    """
    domain = domain_name(domain)
    with errors_of(where):
        if split_of(split) is None:
            raise UserError(f'decathlon/{domain} has no split {split!r}; it has train, val and test')
        folder = _find_root(root)
        categories, images, targets = _read_annotations(folder / 'annotations', domain, split_of(split))
        paths = {image: folder / name for image, name in images.items()}
        first = next(iter(paths.values()))
        if not first.exists():
            raise UserError(f'{first} does not exist; unpack {domain}.tar in {folder / "data"}')
    return DecathlonSource(domain, categories, paths, targets)


def _find_root(root: Optional[str]) -> Path:
    if not root:
        raise UserError('no folder; give that of decathlon-1.0 with --data-dir, or path= of the component')
    path = Path(root).expanduser()
    for folder in (path, path / 'decathlon-1.0'):
        if (folder / 'annotations').is_dir():
            return folder
    raise UserError(f'no folder annotations in {path}; give decathlon-1.0, the folder in decathlon-1.0-devkit.tar.gz')


def _read_annotations(
        folder: Path,
        domain: str,
        split: str,
) -> tuple[dict[int, str], dict[int, str], Optional[list[int]]]:
    """Names of the classes and of the image files by their ids, and the class index of each image if it is known."""
    path = folder / f'{domain}_train.json'
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
        categories = dict(sorted((int(row['id']), str(row['name'])) for row in content['categories']))
        path = folder / f'{domain}_{split}.json'
        if split == 'test' and not path.exists():
            path = folder / f'{domain}_test_stripped.json'
        if split != 'train':
            content = json.loads(path.read_text(encoding='utf-8'))
        images = {int(row['id']): _inside(row['file_name']) for row in content['images']}
        if not images:
            raise ValueError('no images')
        # The stripped files have no annotations, or ones without a category.
        if split == 'test' and not any('category_id' in row for row in content.get('annotations', ())):
            return categories, images, None
        index = {category: i for i, category in enumerate(categories)}
        category_of = {int(row['image_id']): int(row['category_id']) for row in content['annotations']}
        return categories, images, [index[category_of[image]] for image in images]
    except FileNotFoundError:
        raise UserError(f'{path} is missing; unpack decathlon-1.0-devkit.tar.gz there') from None
    except (KeyError, ValueError, TypeError, AttributeError) as e:
        reason = f'{type(e).__name__}: {first_line(e)[:120]}'
        raise UserError(f'{path} is not an annotation file of the challenge ({reason}); unpack it anew') from None


def _inside(name: str) -> str:
    if PurePosixPath(name).is_absolute() or '..' in PurePosixPath(name).parts:
        raise ValueError(f'the image {name!r} is outside of the folder')
    return name


# ---- statistics


def channel_stats(source: Source) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over all pixels of all images, on the scale of 0 to 1.

    The challenge's code reads such numbers from a pickle, which could hold a program as well as numbers and is not
    read here.
    """
    total, squares, count = np.zeros(3), np.zeros(3), 0
    for i in range(len(source)):
        pixels = np.asarray(read_image(source, i, 'RGB'), dtype=np.float64).reshape(-1, 3) / 255
        total += pixels.sum(0)
        squares += (pixels ** 2).sum(0)
        count += len(pixels)
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean ** 2, 0))
    return tuple(mean.tolist()), tuple(std.tolist())
