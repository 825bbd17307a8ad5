"""Options of `train_amf.py` from Python keywords."""
import pytest

from timm_amf.engine.options import keyword_words, parse_args
from timm_amf.errors import UserError


def test_as_the_command_line(tmp_path):
    given = parse_args([
        '--model', 'resnet18', '--lr', '5e-4', '--no-aug', '--mean', '0.5', '0.4', '0.3', '--no-check-images',
        '--model-kwargs', 'img_size=32', "layers=(1, 'a')", '--component', 'name=a,path=x', '--component',
        'name=b,path=y'])
    found = parse_args(*keyword_words(dict(
        model='resnet18', lr=5e-4, no_aug=True, mean=(0.5, 0.4, 0.3), check_images=False,
        model_kwargs=dict(img_size=32, layers=(1, 'a')), component=['name=a,path=x', 'name=b,path=y'], amp=False,
        seed=None)))
    assert vars(found) == vars(given)


def test_keywords_win_over_the_file(tmp_path):
    path = tmp_path / 'options.yaml'
    path.write_text('model: resnet18\nepochs: 3\nlr: 0.1\n')
    args = parse_args(*keyword_words(dict(config=path, epochs=7, data={'path': 'here'})))
    assert (args.model, args.epochs, args.lr, args.recipe['data']) == ('resnet18', 7, 0.1, {'path': 'here'})


def test_unknown_option():
    with pytest.raises(UserError, match='batch_sise: no such option, did you mean batch_size'):
        keyword_words(dict(batch_sise=3))
