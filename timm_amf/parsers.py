"""The flags of each command, by its name.

Nothing here imports torch, so that `--help` and a mistyped flag answer at once; `cli` imports what does the work when
it has flags that make sense.
"""
import argparse
import re
from collections.abc import Sequence

from timm_amf.engine.options import parse_args
from timm_amf.engine.timm_flags import TIMM_FLAGS
from timm_amf.errors import CommandParser, UserError
from timm_amf.flags import add_flags, count, natural, number, share, workers

__all__ = ['IMAGE_ROWS', 'PARSERS', 'add_run_flags', 'parse']

# Flags of timm's that say which images there are, and how they are shown to the network.
_OF_DATA = ('--dataset', '--dataset-download', '--class-map', '--input-key', '--target-key')
_OF_IMAGES = (
    '--input-img-mode', '--img-size', '--input-size', '--crop-pct', '--mean', '--std', '--interpolation',
    '--device-modules')
IMAGE_ROWS = [row for rows in TIMM_FLAGS.values() for row in rows if row[0] in (*_OF_DATA, *_OF_IMAGES)]


def parse(command: str, words: Sequence[str]) -> argparse.Namespace:
    """What the words of a command line say.

    Of the commands that take the flags of `timm-amf train` too, these are checked, and left in `words`.
    """
    parser = PARSERS[command]()
    if command not in _TAKE_TRAIN_FLAGS:
        return parser.parse_args(words)
    args, rest = parser.parse_known_args([word for word in words if word != '--'])
    parse_args(rest, others=parser._option_string_actions)
    return argparse.Namespace(**vars(args), words=rest)


# -- those that take the flags of train -------------------------------------------------------------------------------


def _beside_train(command: str, usage: str, description: str, epilog: str = '') -> CommandParser:
    most = '[--pretrained-path FILE] [--img-size N] [--epochs N] [--batch-size N] [--output DIR] [--experiment NAME]'
    return CommandParser(
        prog=f'timm-amf {command}', allow_abbrev=False, description=description,
        usage=f'%(prog)s {usage}\n       {most}\n       [flags of train]',
        epilog=f'{epilog} timm-amf train --help shows the flags of train.'.strip())


def _fit() -> CommandParser:
    return _beside_train(
        'fit', '[DIR] [--model NAME] [--budget MINUTES]',
        'Fine-tune a model: measure a few ways on the data, train the best to the end.',
        '--budget is about how long it may take, pilots included.')


def _advise() -> CommandParser:
    parser = _beside_train(
        'advise', '[DIR] --model NAME [flags below]',
        'Measure how well pretrained weights fit the data, and propose a Plan for timm-amf train.')
    add = parser.add_argument
    add('--models', metavar='A,B=FILE,...', help='rank these backbones (=FILE: of these weights), and advise the best')
    add('--pilot-epochs', type=natural, metavar='N',
        help='epochs of each pilot, four for each component and network (default: an eighth of --epochs, 2 at least); '
             '0 for none, and an LR by Table 7')
    add('--source-dir', metavar='DIR', help='folder of images of the source data by class, for the EMD similarity')
    add('--random-init', type=natural, default=0, metavar='EPOCHS',
        help="train the network from random weights, too: the paper's best measure, and dear")
    add('--no-source-classifier', action='store_true', help='the weights hold no classifier: leave LEEP and NCE out')
    add('--policy', metavar='NAME', help='policy network of an AMF that is proposed for a plain model; none: MultiTune')
    add('--advice-file', default='advice.yaml', metavar='FILE',
        help='file that timm-amf train --config runs (default: %(default)s); --overwrite replaces it')
    return parser


def _search() -> CommandParser:
    parser = _beside_train(
        'search', '[DIR] --model NAME [flags below]',
        'Find the layers, blocks or windows of layers that are worth tuning.')
    add = parser.add_argument
    add('--ways', nargs='+', type=_way, default=['block'], metavar='WAY',
        help='what to choose from: layer, block, window, topK (top3) and randomK of the layers (default: block)')
    add('--cut', default='residual', choices=('residual', 'activation', 'pooling'),
        help='what ends a block (default: %(default)s)')
    add('--window', type=int, default=3, metavar='N', help='layers of a window (default: %(default)s)')
    add('--separate-norms', action='store_true', help='norms are layers of their own, as in the paper')
    add('--search-role', metavar='ROLE', help='part of the model to search, such as branch.0 (default: the backbone)')
    add('--search-epochs', type=count, metavar='N', help='epochs of each candidate (default: 10, or --epochs if fewer)')
    add('--search-share', type=number(float, above=0, high=1), default=1., metavar='X',
        help='share of the training images that candidates are trained on (default: all)')
    add('--final-share', type=share, default=0., metavar='X',
        help='train the best of each way and both baselines again, for --epochs, on this share (default: do not)')
    add('--search-head', choices=('own', 'mlp'), default='own',
        help="the model's own classifier, or the paper's of three layers (default: own)")
    add('--chunk', type=count, metavar='N', help='most candidates that train at once')
    add('--memory', type=number(float, above=0), metavar='GB',
        help='most memory for their activations (default: half of what is free)')
    add('--one-by-one', action='store_true', help='train each candidate in a network of its own')
    return parser


def _way(text: str) -> str:
    if not re.fullmatch('layer|block|window|(top|random)[1-9][0-9]*', text):
        raise argparse.ArgumentTypeError(
            f'{text}: unknown; choose from layer, block, window, topK, such as top3, and randomK')
    return text


def _sweep() -> CommandParser:
    parser = _beside_train(
        'sweep', '[DIR] --model NAME (--grid KEY=V,V ... | --space KEY=LOW:HIGH ...)',
        'Train by all configurations of a grid, or by those that Optuna draws, and rank them.',
        'KEY is a flag of timm-amf train without its dashes, or ROLE.FIELD as its --role takes it.')
    add = parser.add_argument
    add('--grid', action='extend', nargs='+', default=[], metavar='KEY=V,V', help='values, to combine with all others')
    add('--space', action='extend', nargs='+', default=[], metavar='KEY=RANGE',
        help='what to draw from: LOW:HIGH, log:LOW:HIGH (whole numbers if both limits are), or V,V,...')
    add('--seeds', type=_seeds, default=[], metavar='N,N', help='train each configuration with each')
    add('--trials', type=int, metavar='N', help='configurations to draw from a --space (default: 20)')
    add('--pruner', choices=('none', 'median', 'hyperband'), default='none',
        help='end configurations that fall behind (default: %(default)s)')
    add('--storage', metavar='URL', help="database or journal file of Optuna (default: SQLite in the sweep's folder)")
    add('--test-split', metavar='NAME', help='evaluate the best configuration on this split, once, at the end')
    return parser


def _seeds(text: str) -> list[int]:
    try:
        return [int(seed) for seed in text.split(',')]
    except ValueError:
        raise UserError(f'--seeds {text}: give whole numbers with commas between') from None


# -- those that take runs ---------------------------------------------------------------------------------------------


def _add_weights_flags(parser: argparse.ArgumentParser) -> None:
    """Add what says which weights of a run, and which path through them."""
    add = parser.add_argument
    add('--weights', choices=('best', 'last', 'ema', 'raw'), default='best',
        help='of the best epoch; of the last, the moving average if there is one; the moving average; what the average '
             'is of (default: %(default)s)')
    add('--blocks', metavar='BLOCKS', help='path through a SpotTune: tuned, frozen, policy, or blocks as in 0,3,5')


def add_run_flags(parser: argparse.ArgumentParser, data: bool = True) -> None:
    """Add what says how a model is asked, and which data there are."""
    add = parser.add_argument
    if data:
        add('--split', metavar='NAME', help='train, validation, test, ... (default: what each run was validated on)')
        add('--data-dir', metavar='DIR', help='folder of the data (default: where each run had it)')
    _add_weights_flags(parser)
    add('--ten-crop', action='store_true', help='average over four corners and the centre, and their mirror images')
    add('--sampling-seed', type=natural, metavar='N', help="draw a SpotTune's decisions with this seed")
    add('-b', '--batch-size', type=count, metavar='N',
        help="images at a time, ten crops being ten (default: the run's)")
    add('-j', '--workers', type=workers, metavar='N', help="worker processes (default: the run's)")
    add('--cpu', action='store_true', help='use no GPU')
    add('--device', choices=('cpu', 'cuda'), help='cpu acts as --cpu')
    add('--amp', action='store_true', help='compute in --amp-dtype (default: in float32, whatever the run trained in)')
    add('--amp-dtype', choices=('float16', 'bfloat16'), default='float16', help='default: %(default)s')
    rows = [row for row in IMAGE_ROWS if data or row[0] in _OF_IMAGES]
    add_flags(parser, "Images (timm's; default: the run's)", rows)


def _evaluate() -> CommandParser:
    parser = CommandParser(
        prog='timm-amf evaluate',
        usage='%(prog)s RUN [RUN ...] [flags]\n       %(prog)s [DIR] --model NAME --initial-checkpoint FILE [flags of '
              'train]',
        description='Evaluate trained models: each, their mean, their ensemble.',
        epilog='The second form, with --model or --config, evaluates any weights by the flags of train '
               '(timm-amf train --help).',
    )
    add = parser.add_argument
    add('runs', nargs='+', metavar='RUN',
        help='folder of a run or of a published model, file .onnx, or hf-hub:OWNER/NAME')
    add('--skip-bad-images', action='store_true', help='go on without the images that cannot be read')
    add('--ensemble', action='store_true', help='also the average of the probabilities of all runs')
    add('--confidence', type=float, default=95., metavar='PERCENT', help='of the intervals (default: 95)')
    add('--results-file', metavar='FILE', help='file to write the results to')
    add('--results-format', choices=('csv', 'json'), help='of it (default: by its name, else csv)')
    add('--predictions', metavar='FILE', help='CSV file to write, a row an image')
    add_run_flags(parser)
    return parser


def _predict() -> CommandParser:
    parser = CommandParser(
        prog='timm-amf predict',
        description='What a trained model says of images: the likeliest classes, their probabilities, and weights of '
                    'branches or tuned blocks.',
        epilog='Exit code 3: some images could not be read; their rows say why.')
    add = parser.add_argument
    add('run', metavar='RUN', help='folder of a run or of a published model, file .onnx, or hf-hub:OWNER/NAME')
    add('paths', nargs='+', metavar='PATH', help='image, or folder of images')
    add('--topk', type=count, default=1, metavar='N', help='number of classes (default: %(default)s)')
    add('--output', '--results-file', metavar='FILE', help='file to write (default: what is printed)')
    add('--format', '--results-format', choices=('table', 'csv', 'json'),
        help='default: by the name of the file, else table')
    add_run_flags(parser, data=False)
    return parser


def _report() -> CommandParser:
    parser = CommandParser(
        prog='timm-amf report',
        description='One HTML file of figures and tables, of a run, of several runs, of a search, or of a sweep.')
    add = parser.add_argument
    add('runs', nargs='+', metavar='RUN', help='folder of a run, or one folder of a search or of a sweep')
    add('--output', metavar='DIR', help='folder of the page (default: report/ in the folder of the first run)')
    add('--no-eval', action='store_true', help='draw what the files of the runs tell; their images are not needed')
    add_run_flags(parser)
    return parser


def _export() -> CommandParser:
    parser = CommandParser(
        prog='timm-amf export',
        description='Write the model of a run, or of a published folder, to one file that others can run; run the file '
                    'on random images, and keep it if it computes what the model computes.',
    )
    add = parser.add_argument
    add('run', metavar='RUN', help='folder of a run (args.yaml), or a published one (config.json, model.safetensors)')
    add('--format', default='onnx', choices=('onnx', 'pt2', 'safetensors'),
        help='default: %(default)s, which needs timm_amf[export]')
    add('--int8', action='store_true', help='also an ONNX file of 8 bits, and the accuracy that it costs on validation')
    add('--output', metavar='FILE', help='default: exported.onnx, .pt2 or .safetensors in RUN')
    add('--overwrite', action='store_true', help='replace a file that is there')
    _add_weights_flags(parser)
    add('--img-size', type=int, nargs='+', metavar='N', help='side, or height and width (default: as RUN evaluates)')
    add('--data-dir', metavar='DIR', help="folder of a run's data, for the class names (default: where the run had it)")
    add('--class-names', metavar='FILE', help='text file with one class name a line')
    add('--batch', type=count, default=5, metavar='N', help='largest batch of the check (default: %(default)s)')
    add('--opset', type=int, metavar='N', help="ONNX operator set (default: the exporter's)")
    return parser


def _publish() -> CommandParser:
    parser = CommandParser(
        prog='timm-amf publish',
        description='Publish a run on the Hugging Face Hub: weights, configuration, Plan, options, results and card.',
        epilog='Log in with `hf auth login` first.')
    add = parser.add_argument
    add('run', metavar='RUN', help='folder of the run')
    add('--repo-id', required=True, metavar='OWNER/NAME', help='repository; made if it is not there')
    add('--license', default='', metavar='ID', help='licence of the weights, as the Hub names it: apache-2.0, mit, ...')
    add('--license-name', metavar='NAME', help='name of a licence that is other')
    add('--license-link', metavar='URL', help='where a licence that is other can be read')
    add('--private', action='store_true', help='visible to you alone')
    add('--revision', metavar='BRANCH', help='branch; made if it is not there (default: main)')
    add('-m', '--commit-message', dest='message', metavar='TEXT', help='message of the commit')
    add('--keep-card', action='store_true', help='leave the README.md that the repository has as it is')
    add('--data-dir', metavar='DIR', help='folder of the data, which name the classes (default: where the run had it)')
    add('--compact', action='store_true', help='publish the plain model that SpotTune with --global-k leaves')
    add('--results', metavar='FILE', help='results of timm-amf evaluate --results-file for the card')
    add('--base-model', dest='base_models', action='append', metavar='HUB_ID',
        help='model that it started from (default: found in the run); repeatable')
    add('--dataset', dest='datasets', action='append', metavar='NAME',
        help='Hub id or name of the data (default: of the components); repeatable')
    add('--dry-run', metavar='DIR', help='write what would be published to a new folder, list it, and send nothing')
    return parser


# -- others -----------------------------------------------------------------------------------------------------------


def _demo() -> CommandParser:
    parser = CommandParser(
        prog='timm-amf demo', description='Fine-tune EfficientNet-Lite0 on the embedded images, in three minutes.')
    parser.add_argument('--output', default='output/demo', metavar='DIR', help='folder of its two runs')
    return parser


def _models() -> CommandParser:
    parser = CommandParser(
        prog='timm-amf models', description='List the models, their tags, the recipes, and what is published.')
    parser.add_argument('filter', nargs='?', default='*', help='wildcard on the name, such as amf_*')
    parser.add_argument(
        '--check', action='store_true', help='ask the Hub what is published, instead of what this version knows')
    return parser


def _decathlon() -> CommandParser:
    parser = CommandParser(prog='timm-amf decathlon', description='The Visual Domain Decathlon.')
    verbs = parser.add_subparsers(required=True, dest='verb', metavar='VERB')

    score = verbs.add_parser('score', help='the score of test accuracies')
    score.add_argument('accuracies', nargs='+', metavar='NAME=PERCENT or FILE.yaml',
                       help='the test accuracy of a domain, or a YAML file that maps names to accuracies')

    submit = verbs.add_parser('submit', help='predict the test split of each domain and join the predictions')
    submit.add_argument('runs', nargs='+', metavar='RUN', help='folder of a run: args.yaml and weights')
    submit.add_argument('--data-dir', metavar='DIR', help='the folder decathlon-1.0 (default: where each run had it)')
    submit.add_argument('--out', default='results.json', metavar='FILE',
                        help='file to write, .json or .zip (default: %(default)s)')
    submit.add_argument('--split', choices=('test', 'val'), default='test', help='default: %(default)s')
    submit.add_argument('--weights', choices=('best', 'last'), default='best',
                        help='those of the best epoch, or of the last (default: %(default)s)')
    submit.add_argument('--batch-size', type=count, metavar='N', help="images at a time (default: the run's)")
    submit.add_argument('--workers', type=workers, metavar='N', help="worker processes (default: the run's)")
    submit.add_argument('--cpu', action='store_true', help='use no GPU')

    stats = verbs.add_parser('stats', help='mean and standard deviation of the training images')
    stats.add_argument('domains', nargs='+', metavar='DOMAIN', help='its name in the challenge or in the papers')
    stats.add_argument('--data-dir', required=True, metavar='DIR', help='the folder decathlon-1.0')
    return parser


_TAKE_TRAIN_FLAGS = {'fit': _fit, 'advise': _advise, 'search': _search, 'sweep': _sweep}
PARSERS = {
    **_TAKE_TRAIN_FLAGS, 'evaluate': _evaluate, 'predict': _predict, 'report': _report, 'export': _export,
    'publish': _publish, 'demo': _demo, 'models': _models, 'decathlon': _decathlon}
