"""Sounds that hold several phrases, what a Whisper makes of them when it is told where to listen, and how that is scored."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from recordings import RATE_HZ, Recording
from tqdm import tqdm
from transformers import WhisperForConditionalGeneration, WhisperProcessor
from transformers.modeling_outputs import BaseModelOutput
from words import edits_between, normal_words

import hf_steer
from hf_steer import Saliency
from hf_steer.analysis.provenance import content_hash

LEAD_SECONDS = 0.3
PAUSE_SECONDS = 0.6
WINDOW_SECONDS = 30.0
POSITIONS_PER_SECOND = 50
MOST_TOKENS = 48


@dataclass(frozen=True)
class Sound:
    """Phrases with pauses, one of them pointed at.

    Attributes:
        phrases: one after the other.
        pointed: number of the one that is asked for.
    """

    phrases: tuple[Recording, ...]
    pointed: int

    @property
    def spans(self):
        """Start and end of each phrase in seconds."""
        at, found = LEAD_SECONDS, []
        for phrase in self.phrases:
            found.append((at, at + len(phrase.samples()) / RATE_HZ))
            at = found[-1][1] + PAUSE_SECONDS
        return found

    @property
    def seconds(self):
        return self.spans[-1][1] + PAUSE_SECONDS

    def samples(self):
        parts = [np.zeros(round(LEAD_SECONDS * RATE_HZ), np.float32)]
        for phrase in self.phrases:
            parts += [phrase.samples(), np.zeros(round(PAUSE_SECONDS * RATE_HZ), np.float32)]
        return np.concatenate(parts)

    def alone(self):
        """The pointed-at phrase cut out."""
        return Sound((self.phrases[self.pointed],), 0)

    def span(self, which, margin_seconds=0.0):
        """Of one phrase, with so much of the pauses at both sides."""
        start, end = self.spans[which]
        return max(0.0, start - margin_seconds), min(self.seconds, end + margin_seconds)

    def words(self, which):
        return normal_words(self.phrases[which].text)


def split_phrases(recordings, *, seconds=(0.9, 4.0), words=(3, 10), seed=0):
    """Phrases for choosing and for the report, a third and two thirds; no text is in both, nor twice in one."""
    by_text = {}
    for one in recordings:
        said = tuple(normal_words(one.text))
        if seconds[0] <= one.seconds <= seconds[1] and words[0] <= len(said) <= words[1]:
            by_text.setdefault(said, one)
    found = [by_text[said] for said in sorted(by_text)]
    order = np.random.default_rng(seed).permutation(len(found))
    third = len(found) // 3
    return [found[place] for place in order[:third]], [found[place] for place in order[third:]]


def make_sounds(phrases, count, *, events=3, seed=0):
    """Each phrase is pointed at once before one is pointed at twice; first, middle and last take turns."""
    random = np.random.default_rng(seed)
    asked = np.concatenate([random.permutation(len(phrases)) for _ in range(-(-count // len(phrases)))])[:count]
    found = []
    for number, own in enumerate(asked):
        others = random.choice([place for place in range(len(phrases)) if place != own], events - 1, replace=False)
        place = number % events
        chosen = [*others[:place], own, *others[place:]]
        found.append(Sound(tuple(phrases[one] for one in chosen), place))
    return found


def score(sound, text):
    """What a transcript holds of the phrase that is asked for.

    Returns:
        `recall`: share of its words that were written. `share`: of what was written, the share that are its words. `f1` of the two.
        `edits` and `words`: for the word error rate. `right`: nearer by edits to this phrase than to any other of the sound
        and than to all of it.
    """
    due, found = sound.words(sound.pointed), normal_words(text)
    common = sum((Counter(due) & Counter(found)).values())
    rivals = [sound.words(which) for which in range(len(sound.phrases)) if which != sound.pointed]
    if rivals:
        rivals.append([word for which in range(len(sound.phrases)) for word in sound.words(which)])
    edits = edits_between(due, found)
    return {
        "recall": common / len(due), "share": common / len(found) if found else 0.0, "f1": 2 * common / (len(due) + len(found)),
        "edits": edits, "words": len(due), "right": float(all(edits < edits_between(rival, found) for rival in rivals)),
    }  # fmt: skip


class Ear:
    """A Whisper, with what its encoder made of each sound, and what it wrote under each condition, kept on disk.

    Args:
        folder: of the model.
        cache: where encoder states and transcripts stay, so that a run that was broken off goes on.
        dtype: of the model.
        batch: sounds at once.
        only_known: hear nothing new.
    """

    def __init__(self, folder, cache, dtype=torch.bfloat16, batch=16, only_known=False):
        self.only_known = only_known
        self.processor = WhisperProcessor.from_pretrained(folder, local_files_only=True)
        self.model = WhisperForConditionalGeneration.from_pretrained(folder, local_files_only=True, dtype=dtype).eval()
        self.folder, self.cache, self.batch = Path(folder), Path(cache), batch
        self.cache.mkdir(parents=True, exist_ok=True)
        settings = self.model.generation_config
        first = settings.no_timestamps_token_id + 1
        # a timestamp written where none was asked for would make transformers go on behind it, and encode anew
        self.silenced = [*settings.suppress_tokens, *range(first, self.model.config.vocab_size)]
        self.how = {"language": "en"} if settings.is_multilingual else {}
        self.written = self.cache / f"{self.folder.name}.jsonl"
        self.known = {}
        if self.written.is_file():
            self.known = {row["key"]: row["text"] for row in map(json.loads, self.written.read_text().splitlines())}

    def key(self, sound, *more):
        about = [[(phrase.path.name, phrase.text) for phrase in sound.phrases], LEAD_SECONDS, PAUSE_SECONDS, str(self.model.dtype)]
        return content_hash([self.folder.name, about, more])

    def states(self, sounds):
        """Encoder states, one sound a row."""
        paths = [self.cache / f"{self.key(sound)}.pt" for sound in sounds]
        missing = [place for place, path in enumerate(paths) if not path.is_file()]
        if missing:
            features = self.features([sounds[place] for place in missing])
            with torch.inference_mode():
                made = self.model.get_encoder()(features).last_hidden_state
            for place, one in zip(missing, made, strict=True):
                torch.save(one.clone(), paths[place])
        return torch.stack([torch.load(path) for path in paths])

    def features(self, sounds):
        found = self.processor([sound.samples() for sound in sounds], sampling_rate=RATE_HZ, return_tensors="pt")
        return found.input_features.to(self.model.dtype)

    def hear(self, sounds, name, attention=None, saying=None, **generation):
        """Transcripts under one condition; None where some are not known yet and nothing new is to be heard.

        Args:
            sounds: within one window.
            name: of the condition, for the bar.
            attention: the configuration that steers; None steers nothing.
            saying: takes sounds and gives what is said about them, a row each.
            generation: for `generate`.
        """
        said = None if attention is None else [saying([sound]) for sound in sounds]
        about = None if attention is None else hf_steer.SteerConfig(attention=attention).to_json()
        keys = [self.key(sound, about, None if said is None else said[place], generation, MOST_TOKENS)
                for place, sound in enumerate(sounds)]  # fmt: skip
        missing = [place for place, key in enumerate(keys) if key not in self.known]
        if missing and self.only_known:
            return None
        if missing and attention is not None:
            hf_steer.patch_model(self.model, attention)
        try:
            with tqdm(total=len(sounds), initial=len(sounds) - len(missing), desc=name[:40], leave=False) as bar:
                for start in range(0, len(missing), self.batch):
                    places = missing[start : start + self.batch]
                    part = [sounds[place] for place in places]
                    steering = {} if attention is None else {"saliency": saying(part)}
                    self.note([keys[place] for place in places], self.decode(part, **steering, **generation))
                    bar.update(len(places))
        finally:
            if missing and attention is not None:
                hf_steer.unpatch_model(self.model)
        return [self.known[key] for key in keys]

    def decode(self, sounds, **how):
        states = self.states(sounds)
        unheard = torch.zeros(len(sounds), self.model.config.num_mel_bins, 3000, dtype=states.dtype)  # its length alone counts
        with torch.inference_mode():
            found = self.model.generate(
                unheard, encoder_outputs=BaseModelOutput(last_hidden_state=states), max_new_tokens=MOST_TOKENS,
                suppress_tokens=self.silenced, **self.how, **how,
            )  # fmt: skip
        return self.processor.batch_decode(found, skip_special_tokens=True)

    def note(self, keys, texts):
        with open(self.written, "a", encoding="utf-8") as file:
            for key, text in zip(keys, texts, strict=True):
                self.known[key] = text
                file.write(json.dumps({"key": key, "text": text}) + "\n")

    def prefix(self):
        """What stands before the first word of a transcript."""
        settings = self.model.generation_config
        spoken = [settings.lang_to_id["<|en|>"], settings.task_to_id["transcribe"]] if settings.is_multilingual else []
        return [settings.decoder_start_token_id, *spoken, settings.no_timestamps_token_id]

    def aligned_heads(self, sounds):
        """How much of each head's attention lies on the phrase whose words are being written, where all are written in order.

        Returns:
            `(layers, heads)`, a mean over words of all sounds.
        """
        path = self.cache / f"heads-{content_hash([self.key(sound) for sound in sounds])}.pt"
        if not path.is_file():
            torch.save(self.measure_heads(sounds), path)
        return torch.load(path)

    def measure_heads(self, sounds):
        tokenizer, model = self.processor.tokenizer, self.model
        before = model.config._attn_implementation
        model.set_attn_implementation("eager")
        total, count = 0.0, 0
        prefix = self.prefix()
        for sound in tqdm(sounds, desc="which heads look where", leave=False):
            pieces = [tokenizer(f" {phrase.text}", add_special_tokens=False).input_ids for phrase in sound.phrases]
            tokens = torch.tensor([[*prefix, *(token for piece in pieces for token in piece)]])
            with torch.inference_mode():
                seen = model(encoder_outputs=BaseModelOutput(last_hidden_state=self.states([sound])), decoder_input_ids=tokens,
                             output_attentions=True).cross_attentions  # fmt: skip
            looks = torch.stack([layer[0].float() for layer in seen])  # (layers, heads, tokens, positions)
            at = len(prefix) - 1  # the query out of which a token comes is the one before it
            for span, piece in zip(sound.spans, pieces, strict=True):
                first, last = (round(second * POSITIONS_PER_SECOND) for second in span)
                total = total + looks[:, :, at : at + len(piece), first:last].sum(-1).sum(-1)
                count += len(piece)
                at += len(piece)
        model.set_attn_implementation(before)
        return total / count


STATEMENTS = {
    "phrase": lambda sound, which: [sound.span(which)],
    "phrase and pauses": lambda sound, which: [sound.span(which, PAUSE_SECONDS / 2)],
    "phrase and end": lambda sound, which: [sound.span(which), (sound.seconds, WINDOW_SECONDS)],
}
"""How one points at a phrase: at itself; at half of the pauses beside it, too; at the silence after the sound, too."""


def pointing(statement="phrase", shift=0):
    """Says: listen to the phrase that is asked for (or, shifted, to another)."""

    def saying(sounds):
        spans = [STATEMENTS[statement](sound, (sound.pointed + shift) % len(sound.phrases)) for sound in sounds]
        return joined(Saliency.from_seconds(own, row=row) for row, own in enumerate(spans))

    return saying


def shuffled(statement="phrase"):
    """As many positions of the sound as the phrase has, drawn anywhere in it; what is said of the silence behind it stays."""
    return lambda sounds: Saliency.from_tokens(torch.stack([shuffled_scores(sound, statement) for sound in sounds]))


def shuffled_scores(sound, statement, seed=0):
    """Of each position of the window."""
    scores = torch.zeros(round(WINDOW_SECONDS * POSITIONS_PER_SECOND))
    length = round(sound.seconds * POSITIONS_PER_SECOND)
    for span in STATEMENTS[statement](sound, sound.pointed):
        first, last = (round(second * POSITIONS_PER_SECOND) for second in span)
        scores[first:last] = 1.0
    drawn = torch.Generator().manual_seed(seed + int(scores[:length].sum()) * 7919 + length)
    scores[:length] = scores[:length][torch.randperm(length, generator=drawn)]
    return scores


def uniform(sounds):
    """All of the window alike."""
    return Saliency.from_tokens(torch.ones(len(sounds), round(WINDOW_SECONDS * POSITIONS_PER_SECOND)))


def joined(statements):
    first, *others = statements
    for other in others:
        first = first + other
    return first
