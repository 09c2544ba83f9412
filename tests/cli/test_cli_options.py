"""One style of options: a name per idea, a metavar per kind, and help that says unit, default and what is allowed."""

from __future__ import annotations

import argparse
import re
from collections import defaultdict

import pytest

from hf_steer.cli.kinds import Several
from hf_steer.cli.main import COMMANDS, main, parse

NEEDED = {"inspect": ["MODEL"], "saliency": ["IMAGE"], "calibrate": ["--budget", "1"]}
WRITES_NOTHING = {"inspect", "verify"}
ONE_NAME = {
    "--output": ("out", "dir", "folder", "save", "path"),
    "--model": ("checkpoint", "model-id", "repo"),
    "--image": ("picture", "photo"),
    "--prompt": ("question", "text", "query"),
    "--strength": ("lambda", "scale", "alpha"),
    "--scenes": ("examples", "pictures", "samples"),
    "--seed": ("random", "rng"),
    "--device": ("gpu", "cuda"),
    "--count": ("top-k", "num"),
}
"""The only name of an idea -> names that it could have had. Plurals take several values; `--examples-file` is a file."""


def options():
    """(command, option) of all that `--help` shows; argparse has no public way to list them."""
    for command in COMMANDS:
        parser = parse([command.name, *NEEDED.get(command.name, [])]).parser
        for option in parser._actions:
            if option.help != argparse.SUPPRESS and option.option_strings and option.dest != "help":
                yield command.name, option


OPTIONS = [pytest.param(command, option, id=f"{command} {option.option_strings[0]}") for command, option in options()]


@pytest.mark.parametrize(("command", "option"), OPTIONS)
def test_every_option_explains_itself(command, option):
    (name,) = option.option_strings
    assert re.fullmatch("--[a-z]+(-[a-z]+)*", name)
    assert option.help
    assert not option.help.endswith(".")
    assert option.help[0] == option.help[0].lower() or option.help.startswith("JSON")
    flag = option.nargs == 0
    if flag:
        assert option.metavar is None
        return
    assert re.fullmatch(r"[A-Z]+(,[A-Z]+)*(,\.\.\.)?", option.metavar)
    required = name in ("--budget", "--target-mass")
    assert required or re.search(r"\(default: .+\)$", option.help), "its help says the default"
    assert option.default is None or "%(default)s" in option.help or str(option.default) in option.help


@pytest.mark.parametrize(("command", "option"), OPTIONS)
def test_lists_have_commas_and_plural_names(command, option):
    (name,) = option.option_strings
    several = isinstance(option, Several)
    assert several == bool(option.metavar and option.metavar.endswith(",..."))
    assert not several or name.endswith("s")
    assert option.nargs in (None, 0), "spaces between values would swallow what follows"


def test_an_option_is_the_same_wherever_it_is():
    kinds = defaultdict(set)
    for _, option in options():
        kinds[option.dest].add((option.option_strings[0], str(option.metavar).removesuffix(",...")))
    assert {name: found for name, found in kinds.items() if len(found) > 1} == {}
    defaults = defaultdict(set)
    for _, option in options():
        if option.dest in ("seed", "device", "model", "heads", "json"):
            defaults[option.dest].add(option.default)
    assert {name: found for name, found in defaults.items() if len(found) > 1} == {}


def test_an_idea_has_one_name():
    names = {option.option_strings[0] for _, option in options()}
    for name, others in ONE_NAME.items():
        assert {name, f"{name}s"} & names
        for other in others:
            assert not {found for found in names if re.fullmatch(f"--{other}s?", found)}, f"{name} is its name"


@pytest.mark.parametrize("command", [command.name for command in COMMANDS])
def test_every_command_takes_json_and_writes_where_it_is_told(command):
    names = {option.option_strings[0] for place, option in options() if place == command}
    assert "--json" in names
    assert "--output" in names or command in WRITES_NOTHING
    assert not parse([command, *NEEDED.get(command, [])]).json


FORMER = [
    (["bench", "--level", "attention", "layer"], ["bench", "--levels", "attention,layer"]),
    (["bench", "--phase", "decode", "--shape", "tiny"], ["bench", "--phases", "decode", "--shapes", "tiny"]),
    (["bench", "--dtype", "float32", "--backend", "folded", "mask"], ["bench", "--dtypes", "float32", "--backends", "folded,mask"]),
    (["saliency", "x.png", "--source", "gradient", "--source", "eyes"], ["saliency", "x.png", "--sources", "gradient,eyes"]),
    (["heads", "--examples", "20"], ["heads", "--scenes", "20"]),
    (["simulate", "--heads", "3"], ["simulate", "--num-heads", "3"]),
]


@pytest.mark.parametrize(("former", "now"), FORMER)
def test_former_names_work_and_are_not_shown(former, now, capsys):
    asked, wanted = (vars(parse(words)) for words in (former, now))
    assert asked.pop("parser").prog == wanted.pop("parser").prog
    assert asked == wanted
    with pytest.raises(SystemExit):
        main([former[0], "--help"])
    shown = capsys.readouterr().out
    for word in set(former) - set(now):
        assert not word.startswith("--") or not re.search(rf"{word}[ ,\]]", shown[: shown.index("\n\n")])


def test_several_values_add_up_and_may_be_negative():
    assert parse(["sweep", "--strengths", "-2,0,0.5", "--strengths", "4"]).strengths == (-2.0, 0.0, 0.5, 4.0)
    assert parse(["sweep", "--strengths=-2,0"]).strengths == (-2.0, 0.0)
    assert parse(["heads", "--strength", "-2", "--json"]).strength == -2.0
    assert parse(["sweep"]).strengths is None
    assert parse(["sweep", "--box", "-1,0,3,4.5"]).box == (-1.0, 0.0, 3.0, 4.5)
    assert parse(["bench", "--contenders", "dense mask, position_bias"]).contenders == ("dense mask", "position_bias")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["simlate"], "there is no command 'simlate', only demo, inspect, verify, saliency"),
        (["simlate", "--json"], "did you mean simulate?"),
        (["xyzzy"], "there is no command 'xyzzy', only demo, "),
        ([], "the following arguments are required: COMMAND"),
        (["--jsno"], "the following arguments are required: COMMAND"),
        (["simulate", "--strenghts", "1"], "there is no option --strenghts; did you mean --strengths?"),
        (["simulate", "--strenghts=1"], "there is no option --strenghts; did you mean --strengths?"),
        (["simulate", "--stren", "1"], "there is no option --stren; did you mean --strengths?"),
        (["demo", "--xyzzy"], "there is no option --xyzzy\n"),
        (["sweep", "--strengths", "0", "1"], "'1' belongs to nothing; several values of one option have commas between them"),
        (["heads", "--rule", "sum"], "--rule: must be one of forward, effect"),
        (["heads", "--rule", "efect"], "got 'efect'; did you mean effect?"),
        (["heads", "--count", "0"], "--count: must be a whole number of at least 1; got '0'"),
        (["heads", "--seed", "-1"], "--seed: must be a whole number of at least 0; got '-1'"),
        (["heads", "--strength", "inf"], "--strength: must be a finite number, such as 0.5; got 'inf'"),
        (["bench", "--seconds", "-1"], "--seconds: must not be negative; got -1"),
        (["sweep", "--strengths", "0,,1"], "--strengths: must be a finite number, such as 0.5; got ''"),
        (["sweep", "--box", "1,2"], "--box: must be four numbers with commas between them, left,top,right,bottom; got '1,2'"),
        (["sweep", "--box", "1,2,3,x"], "--box: must be four numbers"),
        (["calibrate"], "one of the arguments --budget --target-mass is required"),
    ],
)
def test_wrong_usage_ends_with_2_and_says_what_is_right(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""
    assert said.err.startswith("usage: hf-steer")


@pytest.mark.parametrize("command", sorted({command.name for command in COMMANDS} - WRITES_NOTHING))
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_computed(command, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    words = [command, *NEEDED.get(command, []), "--output", str(tmp_path / "file" / "under")]
    assert main(words) == 1
    message = f"hf-steer: {tmp_path / 'file'} is no folder, and --output {tmp_path / 'file' / 'under'} needs one there"
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
