"""`timm-amf report`: one HTML file of figures and tables, of a run, of several runs, of a search, or of a sweep.

The page needs no network: figures are SVG elements of it, images are embedded, and there is no script. Beside it lies
each figure as PNG and as the CSV that it was drawn from.
"""
import argparse
import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Optional, Union

from PIL import Image

from timm_amf import figures
from timm_amf.engine.evaluate_runs import evaluations, open_images, summary, why_no_mean
from timm_amf.engine.opened import RunOptions
from timm_amf.engine.run import check_finished
from timm_amf.engine.run_folder import is_run
from timm_amf.errors import UserError
from timm_amf.files import replacing, write_text, writing
from timm_amf.inference.sources import open_model, options_from
from timm_amf.lazy import callable_module
from timm_amf.models.charts import Chart
from timm_amf.models.method import method_of
from timm_amf.report.content import (
    Section,
    Table,
    compared,
    curves,
    model_sections,
    policy_of,
    read_told,
    results_of,
    search_sections,
    setting,
    sweep_sections,
)

__all__ = ['check_installed', 'main', 'report']

callable_module(__name__)  # timm_amf.report(RUN)

_SIDE = 112  # pixels of an embedded image
_SHOWN_ROWS = 60  # of a figure's table on the page
_REMEDY = 'choose another --output'


def main(args: argparse.Namespace) -> Path:
    """Write the page, print where it is, and give it."""
    options = replace(options_from(args), split=args.split, data_dir=args.data_dir)
    page = report(args.runs, args.output, options, not args.no_eval)
    print(page)
    return page


def check_installed() -> None:
    """Refuse before any work where the extra is not installed."""
    try:
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as e:
        raise UserError(f"a report needs {e.name}; pip install 'timm_amf[report]'") from None


def report(
        runs: Sequence[Union[str, Path]],
        output: Union[str, Path, None] = None,
        options: Optional[RunOptions] = None,
        evaluate: bool = True,
) -> Path:
    """Write a page about runs.

    Args:
        runs: Their folders; or one folder of a search or of a sweep.
        output: Folder of the page. None: `report/` in that of the first run.
        options: How they are evaluated.
        evaluate: False draws only what their files tell.

    Returns:
        The page, `index.html`.
    """
    check_installed()
    options, folders = options or RunOptions(), [Path(run) for run in runs]
    target = Path(output) if output else folders[0] / 'report'
    title = folders[0].name if len(folders) == 1 else f'{len(folders)} runs'
    for of_folder, mark in ((search_sections, 'search.yaml'), (sweep_sections, 'trial*-seed*')):
        if len(folders) == 1 and any(folders[0].glob(mark)):
            return _write(target, title, '', of_folder(folders[0]), None)
    for folder in folders:
        if not is_run(folder):
            raise UserError(f'{folder}: no args.yaml there; give the folder of a run, or of one search or sweep')
        check_finished(folder)
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError('a run is given twice; leave one out')
    with writing(target, _REMEDY):
        target.mkdir(parents=True, exist_ok=True)
    every = [read_told(folder) for folder in folders]
    opened = [open_model(folder, options, evaluate) for folder in folders]
    found = evaluations(opened, options) if evaluate else []
    sections = [Section('Results', [results_of(summary(found))])] if found else []
    if found and (why := why_no_mean(found)):
        sections[0].parts.append(f'No mean: {why}.')
    models = [one.load(len(found[i].class_names) if found else None) for i, one in enumerate(opened)]
    data = open_images(opened[0], options) if found and len(folders) == 1 else None
    if data is not None:
        sections += [curves(every[0]), *model_sections(every[0], opened[0], models[0], data, found[0], options)]
    elif len(folders) == 1:
        sections += [curves(every[0]), *policy_of(every[0], models[0])]
    else:
        sections.append(compared(every, found))
    for told, model in zip(every, models):
        sections.append(setting(told, model, str(told.folder) if len(every) > 1 else ''))
    sentences = dict.fromkeys(method_of(model).sentence() for model in models)
    return _write(target, title, ' '.join(sentences), sections, None if data is None else data.load)


# -- the page ---------------------------------------------------------------------------------------------------------


def _write(
        target: Path,
        title: str,
        sentence: str,
        sections: Sequence[Section],
        load: Optional[Callable[[int], Image.Image]],
) -> Path:
    """The files of all charts, and last the page."""
    from jinja2 import Environment, PackageLoader
    from markupsafe import Markup

    @lru_cache(None)
    def thumbnail(index: int) -> Image.Image:
        image = load(index).convert('RGB')
        image.thumbnail((_SIDE, _SIDE))
        return image

    def drawn(chart: Chart) -> Markup:
        figure = figures.draw(chart, thumbnail)
        with replacing(target / f'{chart.name}.png', _REMEDY) as file:
            file.write_bytes(figures.png(figure))
        write_text(target / f'{chart.name}.csv', figures.table_csv(chart), _REMEDY)
        return Markup('') if chart.kind == 'images' else Markup(figures.svg(figure, chart.name, chart.title))

    def data_uri(index: int) -> str:
        file = io.BytesIO()
        thumbnail(index).save(file, format='JPEG', quality=80)
        return f'data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}'

    def groups(chart: Chart) -> dict[str, list[tuple[int, str]]]:
        found: dict[str, list[tuple[int, str]]] = {}
        for group, index, text in zip(*(chart.table[name] for name in ('group', 'image', 'text'))):
            found.setdefault(group, []).append((index, text))
        return found

    def numbers(chart: Chart) -> Optional[Table]:
        rows = list(zip(*chart.table.values()))
        if len(rows) > _SHOWN_ROWS or len(chart.table) > 16:
            return None
        return Table(chart.title, list(chart.table), [[figures.shown(cell) for cell in row] for row in rows])

    environment = Environment(loader=PackageLoader('timm_amf.report', '.'), autoescape=True, trim_blocks=True)
    page = environment.get_template('page.html.j2').render(
        title=title, sentence=sentence, sections=sections, drawn=drawn, data_uri=data_uri, groups=groups,
        numbers=numbers, light=figures.LIGHT, dark=figures.DARK,
        kind=lambda part: type(part).__name__)
    write_text(target / 'index.html', page, _REMEDY)
    return target / 'index.html'
