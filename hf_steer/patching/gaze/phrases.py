"""From the strings of a configuration, think tags and phrases, to the token sequences that gates watch for."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from hf_steer.config import AttentionConfig
from hf_steer.errors import ConfigError
from hf_steer.gating import Patterns
from hf_steer.ground.arguments import Given


def read_patterns(attention: AttentionConfig, model: Any, tokenizer: Any) -> Patterns:
    """Every way in which the tags and phrases may be written in tokens.

    Args:
        attention: with tags and phrases as strings.
        model: whose own tokenizer is loaded when none is given.
        tokenizer: of the model, or its processor; None to load it from where the model came.

    Raises:
        ConfigError: no tokenizer, or one that cannot write a tag or phrase.
    """
    tokenizer = _tokenizer_of(model) if tokenizer is None else getattr(tokenizer, "tokenizer", tokenizer)
    opening, closing = attention.think_tags
    phrases = () if attention.gate is None else attention.gate.phrases or ()
    return Patterns(
        opening=_sequences(tokenizer, "think_tags", opening, (opening,)),
        closing=_sequences(tokenizer, "think_tags", closing, (closing,)),
        phrases=tuple(s for phrase in phrases for s in _sequences(tokenizer, "gate.phrases", phrase, _spellings(phrase))),
    )


def _tokenizer_of(model: Any) -> Any:
    try:
        return AutoTokenizer.from_pretrained(model.name_or_path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            "this configuration reads think tags or phrases (queries, schedule or gate), and the model's tokenizer was not found "
            f"at {model.name_or_path!r}. Give it: patch_model(model, config, tokenizer=tokenizer)."
        ) from error


def _spellings(phrase: str) -> tuple[str, ...]:
    """At the start of a line or after a space, in the case given or capitalised: tokens differ."""
    plain = phrase.strip()
    cases = dict.fromkeys((plain, plain[0].upper() + plain[1:], plain[0].lower() + plain[1:]))
    return tuple(lead + case for case in cases for lead in ("", " "))


def _sequences(tokenizer: Any, name: str, text: str, spellings: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    found: dict[tuple[int, ...], None] = {}
    for spelling in spellings:
        ids = tuple(Given(tokenizer(spelling, add_special_tokens=False)).ids)
        if not ids or tokenizer.decode(ids).strip().casefold() != spelling.strip().casefold():
            raise ConfigError(
                f"attention.{name}: the tokenizer cannot write {text!r} (it reads back as {tokenizer.decode(ids)!r}); it would "
                "never be found. Use a string that its vocabulary covers."
            )
        found[ids] = None
    return tuple(found)
