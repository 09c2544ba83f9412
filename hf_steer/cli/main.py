"""The console script: finds the command, runs it, prints errors, ends quietly when it is cut short."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from functools import partial

from hf_steer import __version__
from hf_steer.cli.bench import BENCH
from hf_steer.cli.calibrate import CALIBRATE
from hf_steer.cli.command import check_output
from hf_steer.cli.demo import DEMO
from hf_steer.cli.heads import HEADS
from hf_steer.cli.inspect import INSPECT
from hf_steer.cli.kinds import nearest
from hf_steer.cli.saliency import SALIENCY
from hf_steer.cli.simulate import SIMULATE
from hf_steer.cli.sweep import SWEEP
from hf_steer.cli.verify import VERIFY
from hf_steer.errors import SteerError

COMMANDS = (DEMO, INSPECT, VERIFY, SALIENCY, HEADS, SWEEP, CALIBRATE, SIMULATE, BENCH)
FAILED, INTERRUPTED, READER_GONE = 1, 130, 141
"""Exit statuses beside 0, and 2 of argparse; the last two are what a shell says of a program that SIGINT or SIGPIPE ended."""
EPILOG = f"""\
hf-steer COMMAND --help says what a command does, with every option, its unit and its default. An option that takes several
values has commas between them, --strengths 0,2,4; so does one that is given twice. A file is given as an option of its own.

exit status
  0    done
  {FAILED}    an error of hf_steer, or a finding: inspect finds no way to patch, verify a broken promise, bench a wrong result
  2    a usage error: an option, a value or a command that does not exist
  {INTERRUPTED}  interrupted with Ctrl-C; files are the old ones or the new ones, never half of one
  {READER_GONE}  whoever read the output has closed it, as head does
"""
_FORMAT = partial(argparse.RawDescriptionHelpFormatter, max_help_position=32)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    try:
        with _flushed():
            return _run(argv)
    except KeyboardInterrupt:
        print("\n" * sys.stderr.isatty() + "hf-steer: interrupted", file=sys.stderr)  # a terminal shows ^C on the line
        return INTERRUPTED
    except BrokenPipeError:
        _let_go()
        return READER_GONE


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; what it parses has the command's `run` and its own `parser`."""
    parser = argparse.ArgumentParser(
        prog="hf-steer", description="Steer the attention of live Hugging Face models.", epilog=EPILOG,
        formatter_class=_FORMAT, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=__version__, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        own = commands.add_parser(
            command.name, description=command.description, help=command.help, formatter_class=_FORMAT, allow_abbrev=False
        )
        command.add_arguments(own)
        own.add_argument("--json", action="store_true", help="print one JSON object and nothing else on standard output")
        own.set_defaults(run=command.run, parser=own)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """What was asked for. A word that is not known ends the program with the word that it may have been meant to be."""
    parser, names = make_parser(), [command.name for command in COMMANDS]
    named = next((word for word in argv if not word.startswith("-")), None)
    if named is not None and named not in names:
        parser.error(f"there is no command {named!r}, only {', '.join(names)}{nearest(named, names)}")
    arguments, strange = parser.parse_known_args(_joined(argv))
    if strange:
        word = strange[0].partition("=")[0]
        if word.startswith("-"):
            known = re.findall(r"--[a-z][a-z-]*", arguments.parser.format_usage())
            arguments.parser.error(f"there is no option {word}{nearest(word, known)}")
        arguments.parser.error(f"{word!r} belongs to nothing; several values of one option have commas between them")
    return arguments


def _run(argv: Sequence[str] | None) -> int:
    arguments = parse(sys.argv[1:] if argv is None else argv)
    try:
        if "output" in arguments:
            check_output(arguments.output)
        return int(arguments.run(arguments))
    except SteerError as error:
        if arguments.json:
            print(json.dumps({"error": str(error), "kind": type(error).__name__}))
        else:
            print(f"hf-steer: {error}", file=sys.stderr)
        return FAILED


def _joined(argv: Sequence[str]) -> list[str]:
    """`--strengths -1,0` as `--strengths=-1,0`: argparse takes what begins with a minus for an option, unless it is one number."""
    words: list[str] = []
    for word in argv:
        if words and re.match(r"-\.?\d", word) and re.fullmatch("--[a-z-]+", words[-1]):
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


@contextlib.contextmanager
def _flushed() -> Iterator[None]:
    """Write out what was printed before the end, where it can still be noticed that nobody reads it."""
    try:
        yield
    finally:
        if sys.stdout is not None:
            sys.stdout.flush()


def _let_go() -> None:
    """Python flushes once more when it exits: into nothing, where a pipe is closed."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
