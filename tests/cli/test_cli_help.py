"""`--help`: it is there at once, and says how the program ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hf_steer.cli.main import COMMANDS, main

HEAVY = ("torch", "transformers", "numpy", "matplotlib", "PIL", "huggingface_hub", "sklearn", "tqdm", "psutil")


def test_help_of_the_program_and_of_every_command_imports_nothing_heavy():
    """Which takes five seconds; this takes none."""
    code = (
        "import sys\n"
        "from hf_steer.cli import main\n"
        f"for command in {[[], *([command.name] for command in COMMANDS)]!r}:\n"
        "    try:\n"
        "        main([*command, '--help'])\n"
        "    except SystemExit as ended:\n"
        "        assert ended.code == 0\n"
        f"found = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert not found, found\n"
    )
    ran = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    for command in COMMANDS:
        assert f"usage: hf-steer {command.name}" in ran.stdout


def printed(capsys, *words):
    with pytest.raises(SystemExit, match="0"):
        main(words)
    return capsys.readouterr().out


def test_help_lists_the_commands_and_the_exit_statuses(capsys):
    text = printed(capsys, "--help")
    for command in COMMANDS:
        assert command.name in text
        assert command.help in " ".join(text.split())
    taught = text[text.index("exit status") :]
    for status, word in (("0", "done"), ("1", "error of hf_steer"), ("2", "usage"), ("130", "Ctrl-C"), ("141", "closed")):
        assert any(line.split()[:1] == [status] and word in line for line in taught.splitlines())


def test_no_line_of_what_we_wrote_is_wider_than_a_terminal_of_132(capsys):
    for command in COMMANDS:
        assert max(map(len, command.description.splitlines())) <= 132
        assert command.description.splitlines()[0] in printed(capsys, command.name, "--help")


def test_the_version_is_the_packages(capsys):
    import hf_steer

    assert printed(capsys, "--version") == f"{hf_steer.__version__}\n"
