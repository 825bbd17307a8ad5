"""Table 7 from the paper's own numbers."""
import pytest

from timm_amf.search.proposal import PAPER, PAPER_BLOCKS, RULES, body_settings, decide, sureness


@pytest.mark.parametrize('name', PAPER)
@pytest.mark.parametrize('known', [
    ('random_minus_fixed',), ('fixed_accuracy',), ('fisher',), ('fixed_accuracy', 'fisher'),
    ('random_minus_fixed', 'fixed_accuracy', 'fisher')])
def test_its_own_data_sets(name, known):
    measures = {k: v for k, v in PAPER[name].measures.items() if k in known}
    decision = decide(measures)
    assert decision.suited == PAPER[name].suited
    assert decision.like == name or 'random_minus_fixed' not in known


def test_differences_of_table_7():
    """Random initialisation minus fixed features, as the paper prints them."""
    found = {n: round(s.measures['random_minus_fixed'], 1) for n, s in PAPER.items()}
    assert found == {'Caltech-256-30': -16.2, 'DTD': -7.8, 'Cars': 28.5, 'Aircraft': 28.9}


def test_chance_is_taken_off():
    assert PAPER['DTD'].measures['fixed_accuracy'] == pytest.approx(100 * (0.746 - 1 / 47) / (1 - 1 / 47))


def test_the_most_reliable_measure_decides():
    agreeing = decide(dict(random_minus_fixed=-10., fixed_accuracy=85., fisher=3.))
    alone = decide(dict(random_minus_fixed=-10.))
    against = decide(dict(random_minus_fixed=-10., fixed_accuracy=40., fisher=0.5))
    assert agreeing.suited and alone.suited and against.suited
    assert agreeing.sure > alone.sure > against.sure
    assert decide(dict(fixed_accuracy=40., fisher=5.)).suited is False
    assert decide(dict(fisher=5.)).sure <= 0.25  # however extreme


def test_emd_has_no_vote():
    assert decide(dict(fisher=3., emd=0.1)).votes == decide(dict(fisher=3., emd=0.9)).votes
    with pytest.raises(ValueError, match='none of'):
        decide(dict(emd=0.5, log_me=1.))


def test_support_of_the_rules():
    """Caltech's best combination re-initialises nothing and Aircraft's does: 2 of 8 results against that rule."""
    assert {k: r.support for k, r in RULES.items()} == dict(lr=1., l2sp=1., reinit=0.75, low=1.)


@pytest.mark.parametrize('value, word', [(1., 'fairly sure'), (0.6, 'fairly sure'), (0.3, 'likely'), (0.1, 'weak'),
                                         (0., 'a guess')])
def test_words(value, word):
    assert sureness(value) == word


def test_settings_of_the_papers_network():
    """On a network of the paper's depth, Tables 3 to 6 come back."""
    def settings(name):
        return body_settings(decide(PAPER[name].measures), PAPER_BLOCKS)

    dtd, cars = settings('DTD'), settings('Cars')
    assert dtd == dict(
        low_blocks=0, reinit_blocks=1, l2sp_alpha=0.001, l2sp_blocks=14, weight_decay=0.001)
    assert settings('Caltech-256-30')['l2sp_blocks'] == PAPER_BLOCKS - 1  # all that keep their weights
    assert cars == dict(low_blocks=8, low_lr_scale=pytest.approx(0.4), reinit_blocks=0, l2sp_alpha=0.)


@pytest.mark.parametrize('blocks', [0, 1, 2, 3, 12, 60])
def test_settings_fit_any_depth(blocks):
    for name, s in PAPER.items():
        settings = body_settings(decide(s.measures), blocks)
        assert settings['low_blocks'] <= blocks, name
        assert settings['reinit_blocks'] + settings.get('l2sp_blocks', 0) <= blocks
        assert settings['reinit_blocks'] < max(blocks, 1)
