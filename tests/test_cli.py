"""The `deitlt` command."""

import subprocess
import sys
from pathlib import Path

import pytest

from deitlt_hf.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]


def test_help_comes_without_the_heavy_libraries():
    code = (
        "import sys; from deitlt_hf.cli import main; main([]); main(['--help']); main(['--version'])\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name in COMMANDS:
        assert f"  {name} " in done.stdout
    assert "deitlt-hf 0." in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_tells_what_it_does(name, capsys):
    """Its help begins with a sentence, and its examples are of commands and scripts that exist."""
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: deitlt {name} ")
    examples = [line.split() for line in text.splitlines() if line.startswith(("deitlt ", "accelerate "))]
    assert any(words[:2] == ["deitlt", name] for words in examples)
    for words in examples:
        if words[0] == "deitlt":
            assert words[1] in COMMANDS
        else:
            assert (ROOT / words[2]).is_file()


@pytest.mark.parametrize(("word", "hint"), [("distil", "did you mean 'distill'"), ("xyz", "deitlt --help lists all")])
def test_an_unknown_command(word, hint, capsys):
    with pytest.raises(SystemExit) as ended:
        main([word])
    assert ended.value.code == 2
    assert hint in capsys.readouterr().err


def test_errors_are_one_sentence():
    """The console script itself, as pip makes it."""
    script = Path(sys.executable).with_name("deitlt")
    done = subprocess.run([script, "plan", "--recipe", "inat"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: no recipe 'inat' (did you mean 'inat18'?)")
    assert "Traceback" not in done.stderr
