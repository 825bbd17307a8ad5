"""The command answers at once: nothing slow is imported before its arguments are known to make sense."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

from timm_amf.cli import _COMMANDS

ROOT = Path(__file__).resolve().parents[1]
# As the script of the wheel does it; the exit code is 99 where torch was imported.
CODE = """
import sys
sys.argv[0] = 'bin/timm-amf'
from timm_amf.cli import main
try:
    code = main()
except SystemExit as e:
    code = e.code
sys.exit(99 if {'torch', 'timm', 'numpy'} & sys.modules.keys() else code)
"""
ENV = {**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, (str(ROOT), os.environ.get('PYTHONPATH'))))}


def command(*words, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, '-c', CODE, *words], capture_output=True, text=True, env=ENV, **kwargs)


# Each command in one process: what it says of `--help`, and of a flag that is mistyped.
EACH = """
import sys
sys.argv[0] = 'bin/timm-amf'
from timm_amf import cli
for command in cli._COMMANDS:
    needed = {'publish': ['--repo-id', 'a/b']}.get(command, [])
    words = ['score', 'dtd=50'] if command == 'decathlon' else ['.', '.', *needed]
    try:
        cli.main([command, '--help'])
    except SystemExit as e:
        assert not e.code
    assert cli.main([command, *words, '--hepl', '3']) == 2
    assert not {'torch', 'timm', 'numpy'} & sys.modules.keys(), command
"""


def test_no_command_imports_torch_for_its_help_or_a_mistyped_flag():
    result = subprocess.run([sys.executable, '-c', EACH], capture_output=True, text=True, env=ENV)
    assert result.returncode == 0, result.stderr
    said = result.stderr.splitlines()
    assert [line.partition(':')[0] for line in said] == [f'timm-amf {command}' for command in _COMMANDS]
    assert all('unknown flag --hepl, did you mean --help?' in line for line in said), said
    assert all(f'usage: timm-amf {command} ' in result.stdout for command in _COMMANDS)


def test_as_a_module_it_is_the_command():
    words = [sys.executable, '-X', 'importtime', '-m', 'timm_amf', 'fit', '--help']
    result = subprocess.run(words, capture_output=True, text=True, env=ENV)
    assert '[--pretrained-path FILE] [--img-size N] [--epochs N] [--batch-size N] [--output DIR]' in result.stdout
    imported = {line.rpartition('|')[2].strip() for line in result.stderr.splitlines()}
    assert 'timm_amf.parsers' in imported and not {'torch', 'timm', 'numpy'} & imported


@pytest.mark.parametrize('words, code, text', [
    (['--version'], 0, 'timm_amf '),
    (['--help'], 0, 'usage: timm-amf COMMAND'),
    (['trian'], 2, 'did you mean train?'),
    (['sweep', '.', '--gird', 'lr=1'], 2, 'did you mean --grid?'),
    (['fit', '/nowhere'], 2, '/nowhere: no such file or folder'),
    (['evaluate', '/nowhere', '--ten-crop'], 2, '/nowhere: no such'),
    (['export', '/nowhere', '--format', 'onnx'], 2, '/nowhere: no such'),
], ids=lambda value: ' '.join(value) if isinstance(value, list) else '')
def test_answers_without_importing_torch(words, code, text):
    result = command(*words)
    assert result.returncode == code, result.stderr
    assert text in result.stdout + result.stderr
    assert code == 0 or result.stderr.count('\n') == 1


def test_a_dataset_that_is_downloaded_makes_its_folder():
    assert 'no such file' not in command('train', '/nowhere', '--dataset', 'torch/cifar10', '--lrr', '1').stderr


def test_the_package_registers_its_models_with_or_without_timm_before_it():
    code = (
        'import sys, timm_amf, timm; assert timm.is_model("amf") and timm_amf.Plan().epochs; '
        'assert not any(m.startswith("timm_amf.hub") for m in sys.modules)')  # nobody pays for it
    assert subprocess.run([sys.executable, '-c', code], env=ENV).returncode == 0


@pytest.mark.parametrize('words', [['--help'], ['train', '--help']], ids=' '.join)
def test_a_reader_that_has_enough_is_no_error(words):
    process = subprocess.Popen(
        [sys.executable, '-c', CODE, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENV)
    process.stdout.close()
    assert process.stderr.read() == b'' and process.wait() == 0
