"""What goes wrong in a command is one line and an exit code."""
import json
import logging
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from timm_amf.cli import main
from timm_amf.errors import CommandParser, Interrupted, UserError, run_command
from timm_amf.files import write_text


def _fails(capsys, work, **kwargs) -> tuple[int, str]:
    code = run_command('timm-amf fly', work, **kwargs)
    out, err = capsys.readouterr()
    assert not out and err.startswith('timm-amf fly: ') and err.count('\n') == 1
    return code, err


def _raises(error):
    def work():
        raise error
    return work


def test_exit_codes(capsys):
    assert run_command('timm-amf fly', lambda: print('done')) == 0
    assert capsys.readouterr() == ('done\n', '')
    assert _fails(capsys, _raises(UserError('no wings;\nfold'))) == (2, 'timm-amf fly: error: no wings; fold\n')
    assert _fails(capsys, _raises(KeyboardInterrupt()), interrupted='landed') == (130, 'timm-amf fly: landed\n')
    assert _fails(capsys, _raises(Interrupted(signal.SIGTERM, 'stopped')))[0] == 128 + signal.SIGTERM


def test_what_a_user_can_mend_is_a_line(capsys, tmp_path):
    damaged = tmp_path / 'damaged.safetensors'
    damaged.write_bytes(b'12345')
    (tmp_path / 'latin.txt').write_bytes(b'\xff\xfe\xff')
    layer = torch.nn.Linear(2, 2)
    for work, words in (
        (lambda: open(tmp_path / 'gone'), 'gone: No such file'),
        (lambda: (tmp_path / 'damaged.safetensors' / 'x').read_text(), 'Not a directory'),
        (lambda: json.loads('{'), 'is no JSON'),
        (lambda: yaml.safe_load('a: ]'), 'is no YAML'),
        (lambda: (tmp_path / 'latin.txt').read_text(encoding='utf-8'), 'UTF-8'),
        (lambda: load_file(damaged), 'no safetensors file'),
        (lambda: layer.load_state_dict({'weight': torch.zeros(3, 3)}), 'lacks 1, such as bias; of another shape: 1'),
        (lambda: layer.load_state_dict({**layer.state_dict(), 'x': layer.bias}), 'the model lacks 1, such as x\n'),
        (lambda: layer(torch.zeros(1, 5)), 'shapes cannot be multiplied'),
        (_raises(torch.OutOfMemoryError('1 GiB')), 'lower the batch size'),
        (_raises(ModuleNotFoundError('', name='sklearn.linear_model')), 'timm_amf[search]'),
    ):
        code, line = _fails(capsys, work)
        assert code == 2 and words in line, line


def test_a_defect_is_a_line_and_a_file_with_the_traceback(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    code, line = _fails(capsys, _raises(ZeroDivisionError('by hf_abcdefghijklmnop')))
    (file,) = tmp_path.iterdir()
    assert code == 1 and str(file) in line and 'ZeroDivisionError' in line
    assert 'in work' in file.read_text() and 'hf_abc' not in file.read_text() + line
    assert _fails(capsys, lambda: eval('(' * 10_000))[0] == 1
    with pytest.raises(ZeroDivisionError):
        run_command('timm-amf fly', _raises(ZeroDivisionError()), show_traceback=True)


def test_the_flag_for_tracebacks(capsys):
    assert main(['evaluate', 'no-such-run', '--weights', 'best']) == 2
    assert 'no-such-run' in capsys.readouterr().err
    with pytest.raises(UserError):
        main(['evaluate', '--traceback', 'no-such-run', '--weights', 'best'])


def test_a_parser_has_no_usage_before_its_error(capsys):
    with pytest.raises(UserError, match='unknown flag --wings; --help lists them'):
        CommandParser(prog='timm-amf fly').parse_args(['--wings'])
    assert capsys.readouterr() == ('', '')


@pytest.mark.parametrize('command', ('export', 'publish'))
def test_commands_without_arguments(command, capsys):
    assert main([command]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith(f'timm-amf {command}: error: the following arguments are required: RUN')
    assert err.count('\n') == 1


def test_a_file_does_not_take_the_place_of_a_device(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    (tmp_path / 'device').symlink_to('/dev/null')
    for name in ('pipe', 'device'):
        with pytest.raises(UserError, match=f'{name}: cannot be written .a device or a pipe is there'):
            write_text(tmp_path / name, 'x')
    assert (tmp_path / 'pipe').is_fifo() and (tmp_path / 'device').is_symlink()


def test_errors_import_nothing_slow():
    source = Path(__import__('timm_amf.errors').errors.__file__).read_text()
    assert not any(f'import {name}' in source for name in ('torch', 'yaml', 'timm', 'huggingface_hub'))


def test_every_handler_has_each_message_once():
    heard: list[list[str]] = [[], []]
    handlers = [logging.Handler() for _ in heard]
    for handler, texts in zip(handlers, heard):
        handler.emit = lambda record, texts=texts: texts.append(record.getMessage())
        logging.getLogger().addHandler(handler)
    logger = logging.getLogger('timm_amf.test')
    try:
        run_command('x', lambda: [logger.warning(text) for text in ('a', 'b', 'a')] and 0)
        logger.warning('a')
    finally:
        for handler in handlers:
            logging.getLogger().removeHandler(handler)
    assert heard == [['a', 'b', 'a']] * 2  # the last of them after the command
