"""Lines of an examples file: what each may hold, and what is said of one that holds something else."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hf_steer.errors import FileError, SaliencyError, shown

Check = tuple[Callable[[Any], bool], str]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_range(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))


def _is_look(value: Any) -> bool:
    several = value if isinstance(value, list) and not _is_range(value) else [value]
    return bool(several) and all(_is_text(own) or (_is_range(own) and all(isinstance(end, int) for end in own)) for own in several)


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str) for turn in value
    )  # fmt: skip


TEXT: Check = (lambda value: isinstance(value, str), "text")
SOME_TEXT: Check = (_is_text, "text, and not empty")
FIELDS: Mapping[str, Check] = MappingProxyType(
    {
        "prompt": SOME_TEXT,
        "messages": (_is_conversation, 'a list such as [{"role": "user", "content": "..."}]'),
        "look": (_is_look, 'quoted words of the prompt, [first character, end], or a list of them'),
        "occurrence": (lambda value: isinstance(value, int) and not isinstance(value, bool), "a whole number, from 0"),
        "image": SOME_TEXT,
        "question": TEXT,
        "box": (lambda value: isinstance(value, list), "[left, top, right, bottom], or a list of such boxes"),
        "unit": TEXT,
        "audio": SOME_TEXT,
        "seconds": (_is_range, "[start, end] in seconds"),
        "language": SOME_TEXT,
        "thought": TEXT,
        "answer": SOME_TEXT,
    }
)
"""Field -> whether a value is one, and what it must be."""


@dataclass(frozen=True)
class Form:
    """One kind of line.

    Attributes:
        needs: fields that are there.
        takes: fields that may be there, too.
        sample: a line.
    """

    needs: tuple[str, ...]
    takes: tuple[str, ...]
    sample: str


FORMS: Mapping[str, Form] = MappingProxyType(
    {
        "image": Form(
            ("image", "question", "box"), ("answer", "thought", "unit"),
            '{"image": "cat.png", "question": "What is this?", "box": [40, 10, 200, 180], "answer": "cat"}',
        ),
        "audio": Form(
            ("audio", "seconds"), ("question", "answer", "thought", "language"),
            '{"audio": "bells.wav", "seconds": [0.5, 1.2], "question": "What is heard?", "answer": "a bell"}',
        ),
        "messages": Form(
            ("messages", "look"), ("answer", "thought", "occurrence"),
            '{"messages": [{"role": "user", "content": "..."}], "look": "two words", "answer": "yes"}',
        ),
        "prompt": Form(
            ("prompt", "look"), ("answer", "thought", "occurrence"),
            '{"prompt": "A: red. B: blue. Which colour?", "look": "B: blue.", "answer": "blue"}',
        ),
    }
)  # fmt: skip
"""The field that tells them apart -> form."""


@dataclass(frozen=True)
class Line:
    """One line, checked.

    Attributes:
        form: key of `FORMS`.
        values: its fields.
        source: the file.
        number: of the line, from 1.
    """

    form: str
    values: Mapping[str, Any]
    source: Path
    number: int

    def error(self, error: Exception) -> Exception:
        """The same error, with file and line ahead of what it says."""
        return type(error)(f"{self.source}, line {self.number}: {error}")


def read_lines(path: str | os.PathLike[str]) -> list[Line]:
    """The lines of an examples file that are not empty.

    Raises:
        FileError: a file that cannot be read or has no lines, or a line that is none of `FORMS`; the line is named.
    """
    source = Path(path)
    try:
        texts = source.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{source} cannot be read: {error}") from error
    lines = []
    for number, text in enumerate(texts, 1):
        if text.strip():
            try:
                lines.append(Line(*_checked(text), source, number))
            except (FileError, SaliencyError) as error:
                raise type(error)(f"{source}, line {number}: {error}") from error
    if not lines:
        raise FileError(f"{source} has no lines; give one JSON object a line, such as {FORMS['prompt'].sample}")
    return lines


def _checked(text: str) -> tuple[str, dict[str, Any]]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise FileError(f"not JSON ({error}).") from error
    if not isinstance(values, dict):
        raise FileError(f"a line is an object, such as {FORMS['prompt'].sample}; got {type(values).__name__}.")
    found = next((name for name in FORMS if name in values), None)
    if found is None:
        ways = "; ".join(f"with {name!r}: {form.sample}" for name, form in FORMS.items())
        raise FileError(f"a line says what it asks about with one of {', '.join(FORMS)}; got {sorted(values)}. {ways}")
    form = FORMS[found]
    missing, strange = sorted(set(form.needs) - set(values)), sorted(set(values) - {*form.needs, *form.takes})
    if missing or strange:
        faults = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has {', '.join(strange)}"] * bool(strange)
        raise FileError(
            f"a line is an object with {', '.join(form.needs)} and, if wanted, {', '.join(form.takes)}; this one "
            f"{' and '.join(faults)}. Such as {form.sample}"
        )
    wrong = [name for name, value in values.items() if not FIELDS[name][0](value)]
    if wrong:
        faults = [f"{name} must be {FIELDS[name][1]}; got {shown(values[name])}" for name in wrong]
        raise FileError(f"{'. '.join(faults)}.")
    return found, values
