"""What a block-wise search found, as data."""
import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

from timm_amf.engine.intervals import wilson_interval
from timm_amf.errors import UserError
from timm_amf.files import replacing
from timm_amf.search.candidates import Candidate

__all__ = ['BASELINES', 'CandidateResult', 'SearchResults']

# The paper's baselines I and II.
BASELINES = ('classifier', 'all')


@dataclass(frozen=True)
class CandidateResult:
    """How a candidate fared.

    Attributes:
        candidate: What was tuned.
        top1: Validation accuracy after the last epoch, in percent.
        loss: Validation loss after it.
        images: Validation images.
        parameters: Number of parameters that trained, the classifier's included.
        epochs: Epochs that it trained.
        stopped: Successive halving stopped it before the end.
        curve: (epochs trained, top1, loss) of each evaluation.
    """
    candidate: Candidate
    top1: float
    loss: float
    images: int
    parameters: int
    epochs: int
    stopped: bool = False
    curve: tuple[tuple[int, float, float], ...] = ()

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Wilson's interval of the accuracy, in percent: what other images of the same kind could have given."""
        low, high = wilson_interval(self.top1 / 100 * self.images, self.images, level)
        return 100 * low, 100 * high

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        values = dataclasses.asdict(self)
        # JSON has no NaN, which is the loss of what diverged.
        values['loss'] = self.loss if math.isfinite(self.loss) else None
        values['curve'] = [[e, t, v if math.isfinite(v) else None] for e, t, v in self.curve]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> 'CandidateResult':
        """From `to_dict`."""
        candidate = Candidate(**{**values['candidate'], 'modules': tuple(values['candidate']['modules'])})
        curve = tuple((e, t, math.nan if v is None else v) for e, t, v in values['curve'])
        loss = math.nan if values['loss'] is None else values['loss']
        return cls(**{**values, 'candidate': candidate, 'curve': curve, 'loss': loss})


@dataclass
class SearchResults:
    """All candidates of a search.

    Attributes:
        model: Name of the network.
        role: Its role that was searched.
        seed: Seed of splits, weights of the classifier, order and augmentation.
        classes: Number of classes.
        train_images: Images that the candidates were trained on.
        results: Of the search: both baselines and all candidates of all ways, in the order in which they run.
        final_images: Images that the winners were trained on afterwards; 0 where that was not asked for.
        final: Then: both baselines and the best of each way, trained anew on those.
        seconds: Time that it took; where it was resumed, the last part of it.
    """
    model: str
    role: str
    seed: int
    classes: int
    train_images: int
    results: list[CandidateResult] = field(default_factory=list)
    final_images: int = 0
    final: list[CandidateResult] = field(default_factory=list)
    seconds: float = 0.

    @property
    def ways(self) -> list[str]:
        """The ways that were searched, without the baselines."""
        return list(dict.fromkeys(r.candidate.way for r in self.results if r.candidate.way not in BASELINES))

    def of_way(self, way: str) -> list[CandidateResult]:
        """The candidates of a way, from the input to the output."""
        return sorted((r for r in self.results if r.candidate.way == way), key=lambda r: r.candidate.position)

    def ranked(self, way: Optional[str] = None) -> list[CandidateResult]:
        """All candidates, or those of a way, the best first; baselines are among all of them.

        What trained to the end comes before what was stopped, and of equal ones the one with fewer parameters.
        """
        chosen = [r for r in self.results if way in (None, r.candidate.way)]
        return sorted(chosen, key=lambda r: (r.stopped, -r.top1, r.parameters))

    def winner(self, way: Optional[str] = None) -> CandidateResult:
        """The best of a way; without one, of all ways and both baselines."""
        return self.ranked(way)[0]

    def write(self, path: Union[str, Path]) -> None:
        """Write as JSON, whole or not at all."""
        values = {**dataclasses.asdict(self), 'results': [r.to_dict() for r in self.results],
                  'final': [r.to_dict() for r in self.final]}
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(values, indent=1), encoding='utf-8')

    @classmethod
    def read(cls, path: Union[str, Path]) -> 'SearchResults':
        """Read what `write` wrote.

        Raises:
            UserError: If it is missing, or something else.
        """
        try:
            values = json.loads(Path(path).read_text(encoding='utf-8'))
            parts = {name: [CandidateResult.from_dict(v) for v in values[name]] for name in ('results', 'final')}
            return cls(**{**values, **parts})
        except OSError as e:
            raise UserError(f'{path}: cannot be read ({e.strerror}); give the folder of a finished search') from None
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f'{path}: holds no results of a search ({type(e).__name__}: {e})') from None
