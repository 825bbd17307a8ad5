"""What goes wrong in a verb is one line and an exit code."""
import signal

import pytest

from timm_amf.cli import main
from timm_amf.errors import UserError
from timm_amf.verbs import VerbParser, run_verb


def test_exit_codes(capsys):
    assert run_verb('timm-amf fly', lambda: print('done')) == 0
    assert capsys.readouterr() == ('done\n', '')

    def mistaken():
        raise UserError('no wings; grow some')

    assert run_verb('timm-amf fly', mistaken) == 2
    assert capsys.readouterr() == ('', 'timm-amf fly: error: no wings; grow some\n')

    def stopped():
        raise KeyboardInterrupt

    assert run_verb('timm-amf fly', stopped, 'interrupted; landed') == 128 + signal.SIGINT
    assert capsys.readouterr() == ('', 'timm-amf fly: interrupted; landed\n')


def test_what_is_a_defect_is_not_hidden():
    def defective():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_verb('timm-amf fly', defective)


def test_a_parser_has_no_usage_before_its_error(capsys):
    with pytest.raises(UserError, match='unrecognized arguments: --wings'):
        VerbParser(prog='timm-amf fly').parse_args(['--wings'])
    assert capsys.readouterr() == ('', '')


@pytest.mark.parametrize('verb', ('export', 'publish'))
def test_verbs_without_arguments(verb, capsys):
    assert main([verb]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith(f'timm-amf {verb}: error: the following arguments are required: RUN')
    assert err.count('\n') == 1
