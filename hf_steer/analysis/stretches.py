"""What a model looks at in a text, token by token, and listens to in a sound, moment by moment; by every source that can."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_steer.analysis.asked.prompts import Reader, features_of, first_tokens, sound_in, sound_prompt
from hf_steer.analysis.heads.candidates import attending
from hf_steer.analysis.heads.scores import weights_at
from hf_steer.analysis.tables import as_text
from hf_steer.config import SaliencyConfig
from hf_steer.errors import ConfigError
from hf_steer.files import write_whole
from hf_steer.ground.arguments import Given, named
from hf_steer.ground.attention_call import AttentionCall
from hf_steer.ground.outputs import logits_in
from hf_steer.patching import probe_attention, read_saliency
from hf_steer.registry import SOURCES

TEXT_SOURCES = ("decoder_attention", "gradient")
"""Those that say something of text: the others compare pictures or sounds with it."""
_SHOWN = 5
"""Stretches of the highest score in print."""
Heads = Mapping[int, Sequence[int]] | None


@dataclass(frozen=True)
class Stretches:
    """What `hf-steer saliency` prints of a text or a sound.

    Attributes:
        model: whose gaze it is.
        names: of the stretches: tokens as text, or where moments begin, in seconds.
        scores: source -> a raw score for each of them.
        files: what was written.
    """

    model: str
    names: tuple[str, ...]
    scores: Mapping[str, tuple[float, ...]]
    files: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        scores = {name: list(own) for name, own in self.scores.items()}
        return {"model": self.model, "names": list(self.names), "scores": scores, "files": list(self.files)}

    def __str__(self) -> str:
        rows: list[dict[str, Any]] = []
        for name, own in self.scores.items():
            best = sorted(range(len(own)), key=lambda place, own=own: -own[place])[:_SHOWN]  # type: ignore[misc]
            rows += [{"source": name, "place": place, "of": repr(self.names[place]), "score": own[place]} for place in best]
        return "\n".join([f"{self.model} looks most at", "", as_text(rows), "", *(f"Written: {path}" for path in self.files)])


def see_text(model: Any, reader: Reader, prompt: str, *, sources: Sequence[str] | None, heads: Heads, answer: str | None) -> tuple[
    tuple[str, ...], dict[str, Tensor]
]:  # fmt: skip
    """Tokens of one user turn, and their scores.

    Raises:
        ConfigError: a source that says nothing of text, heads that are not there, or an answer without tokens.
    """
    wanted = _wanted(sources, TEXT_SOURCES, "of a text")
    tokenizer = reader.tokenizer
    templated = bool(getattr(tokenizer, "chat_template", None))
    turn = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) if templated else prompt
    ids = torch.tensor([reader.ids(text, special=not templated)], device=model.device)
    inputs = named(ids=ids, mask=torch.ones_like(ids))
    ways: Mapping[str, Callable[[], Tensor]] = {
        "decoder_attention": lambda: attention_of_last(model, inputs, heads),
        "gradient": lambda: _gradient(model, ids, answer_token(reader, answer)),
    }
    found = {name: ways[name]() for name in TEXT_SOURCES if {name} & set(wanted)}
    return tuple(tokenizer.decode([token]) for token in ids[0].tolist()), found


def see_sound(
    model: Any, reader: Reader, path: Path, prompt: str, *, sources: Sequence[str] | None, heads: Heads, answer: str | None
) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """Moments of a sound, and their scores: of the tokens in the prompt, or of what an encoder hands on.

    Raises:
        FileError: no sound that can be read.
        ConfigError: a source that says nothing of sounds, heads that are not there, or an answer without tokens.
    """
    if reader.crosses:
        _wanted(sources, ("decoder_attention",), "of what an encoder hands on")
        features, seconds = features_of(path, reader)
        inputs = {**features, **named(decoder_ids=torch.tensor([first_tokens(reader, None)]))}
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        scores = attention_of_last(model, inputs, heads, attends="cross")
        step = attending(model, "cross").frame_seconds or seconds / len(scores)
        kept = scores[: max(1, round(seconds / step))]
        return tuple(f"{place * step:.2f} s" for place in range(len(kept))), {"decoder_attention": kept}
    able = tuple(name for name, row in SOURCES.items() if row.prompt is not None)
    sound, seconds, put = sound_in(path, reader)
    inputs = {name: value.to(model.device) for name, value in put(sound_prompt(reader, prompt), sound).items()}
    found = {}
    for name in _wanted(sources, able, "of a sound"):
        own = {"source_heads": "all" if heads is None else heads, "answer_token": answer_token(reader, answer)}
        options = {option: value for option, value in own.items() if option in SOURCES[name].options}
        seen = read_saliency(model, inputs, saliency=SaliencyConfig(source=name, **options))  # type: ignore[arg-type]
        found[name] = seen.maps()["audio", 0, 0].flatten()
    count = len(next(iter(found.values())))
    return tuple(f"{place * seconds / count:.2f} s" for place in range(count)), found


def write_stretches(name: str, names: tuple[str, ...], found: Mapping[str, Tensor], output: Path, *, title: str) -> Stretches:
    """Scores as a picture and as JSON."""
    from hf_steer.analysis.plots.stretches import plot_stretches

    scores = {source: tuple(own.float().tolist()) for source, own in found.items()}
    picture, table = plot_stretches(names, scores, output / "saliency.png", title=title), output / "saliency.json"
    seen = Stretches(name, names, scores, (str(picture), str(table)))
    write_whole(table, (json.dumps(seen.to_dict(), ensure_ascii=False) + "\n").encode())
    return seen


@torch.no_grad()
def attention_of_last(model: Any, inputs: Mapping[str, Tensor], heads: Heads, *, attends: Any = "self") -> Tensor:
    """`(keys,)`: what the last token attends to, in the mean over heads."""
    anatomy = attending(model, attends)
    there = {site.index: range(site.heads) for site in anatomy.layers}
    chosen: Mapping[int, Sequence[int]] = there if heads is None else heads
    wrong = [layer for layer, own in chosen.items() if layer not in there or not set(own) <= set(there[layer])]
    if wrong:
        raise ConfigError(f"layer {wrong[0]} is not there, or has other heads; see `hf-steer inspect`.")
    given = Given(inputs)
    length = (given.ids if given.decoder_ids is None else given.decoder_ids).shape[1]
    found: list[Tensor] = []

    def read(call: AttentionCall) -> None:
        if call.layer in chosen:
            found.extend(weights_at(call, torch.tensor([length - 1]))[0, list(chosen[call.layer])])

    with probe_attention(model, read, sites=anatomy.layers):
        model(**inputs)
    return torch.stack(found).mean(0)


def answer_token(reader: Reader, answer: str | None) -> int | None:
    """First token of an answer.

    Raises:
        ConfigError: it has none.
    """
    if answer is None:
        return None
    ids = reader.ids(answer)
    if not ids:
        raise ConfigError(f"--answer {answer!r} has no tokens in this model's vocabulary.")
    return ids[0]


def _gradient(model: Any, ids: Tensor, token: int | None) -> Tensor:
    """`(tokens,)`: gradient × input of the answer's logit."""
    with torch.enable_grad():
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = logits_in(model(**named(embeds=embeds)))[0, -1].float()
        (slope,) = torch.autograd.grad(logits[int(logits.argmax()) if token is None else token], [embeds])
    scores: Tensor = (slope * embeds).detach().float().sum(-1)[0].cpu()
    return scores


def _wanted(sources: Sequence[str] | None, able: Sequence[str], what: str) -> tuple[str, ...]:
    strange = [name for name in sources or () if name not in able]
    if strange:
        raise ConfigError(f"--sources: {', '.join(strange)} says nothing {what}; those that do are {', '.join(able)}.")
    return tuple(sources or able)
