"""Whisper and SmolLM2 joined: where the projection between them starts, how it is trained, and what the joined model writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ear_sounds import STACKED, Sound
from mind_training import KINDS, LOADED, side_by_side
from tqdm.auto import tqdm
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.voxtral.modeling_voxtral import VoxtralEncoder

import hf_steer
from hf_steer import AlignerConfig, SteerConfig
from hf_steer.training import collect_balance

BEFORE = "Sound: to to call call call me me press press press three\nText: to call me press three\nSound:"
AFTER, END = "\nText:", "\n"
"""Around a sound, and after its transcript. One example tells a frozen decoder what is wanted; turns of a chat help less."""
BATCH, RATE = 8, 5e-4
ROUNDS, LOOSE_RIDGE, RIDGE = 6, 0.3, 1e-3
"""Of the fit in which the projection starts: rounds that find out what is spoken where, their ridge as a share of the states'
mean square (a tight fit would believe whatever it was told at first), and that of the fit in the end."""
WORD_SHARE = 1.0
"""Of a token's embedding, the rest is the mean of all: what the projection starts out to say where that token is spoken."""
ALIKE = 4
"""Batches' worth of sounds that are sorted by length together, so that little of a batch is padding."""
SETTINGS = (BEFORE, AFTER, END, BATCH, RATE, ROUNDS, LOOSE_RIDGE, RIDGE, WORD_SHARE, ALIKE)
"""Where one of them is another, so is a run."""
IGNORED = -100


class Remembering(VoxtralEncoder):
    """The ear of the joined model, which also takes states that it had handed on before: it hands them on as they are.

    What is inserted behind the ear, and the model around it, notice no difference.
    """

    def forward(self, input_features: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        """Of `(batch, mels, steps)` as ever, or of `(1, frames, features)`, sound after sound."""
        if input_features.shape[-1] != self.config.hidden_size:
            return super().forward(input_features, attention_mask, **kwargs)
        return BaseModelOutputWithPooling(last_hidden_state=input_features)


def join(ear: Path, mind: Path, kind: str) -> tuple[Any, Any]:
    """One model in bfloat16, of which what is trained is in float32, and its processor."""
    decoder = AutoModelForCausalLM.from_pretrained(mind, **LOADED)
    model, processor = hf_steer.compose(
        AutoModel.from_pretrained(ear, **LOADED), decoder, tokenizer=AutoTokenizer.from_pretrained(mind),
        feature_extractor=AutoFeatureExtractor.from_pretrained(ear), pooling="stack",
    )  # fmt: skip
    heard = model.model.audio_tower
    with torch.device("meta"):
        tower = Remembering._from_config(heard.config, attn_implementation=LOADED["attn_implementation"])
    tower.load_state_dict(heard.state_dict(), assign=True)
    model.model.audio_tower = tower.requires_grad_(False).eval()
    if KINDS[kind]:
        aligner = AlignerConfig(modality="audio", placement="output", **KINDS[kind])
        hf_steer.patch_model(model, SteerConfig(aligners=(aligner,), train_projector=True))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model, processor


class Writer:
    """Prompts and answers of a joined model as its tokens.

    Args:
        model: joined.
        processor: its own.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.tokenizer = model, processor.tokenizer
        self.placeholder = self.tokenizer.convert_tokens_to_ids(processor.audio_token)
        self.before, self.after, self.ends = self.ids(BEFORE), self.ids(AFTER), [*self.ids(END), self.tokenizer.eos_token_id]

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def inputs(self, sounds: Sequence[Sound], answers: Sequence[str] | None = None) -> tuple[dict[str, Any], torch.Tensor]:
        """Left-padded prompts, with answers or without, and labels for as many tokens as the longest answer has."""
        said = [[] if answers is None else self.ids(f" {answers[row]}{END}") for row in range(len(sounds))]
        rows = [[*self.before, *[self.placeholder] * one.tokens, *self.after, *own] for one, own in zip(sounds, said, strict=True)]
        longest, last = max(map(len, rows)), max(map(len, said))
        given = {
            "input_ids": torch.tensor([[self.tokenizer.pad_token_id] * (longest - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
            "input_features": torch.cat([one.states for one in sounds])[None],
        }
        return given, torch.tensor([[IGNORED] * (last - len(own)) + own for own in said])

    def round(self) -> None:
        """What was trained, to the precision of the rest; not the whole model, whose rotary frequencies would be rounded, too."""
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)

    def losses(self, sounds: Sequence[Sound], answers: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each answer: the sum over its tokens of minus their log probability, and how many tokens it has."""
        given, labels = self.inputs(sounds, answers)
        logits = self.model(**given, use_cache=False, logits_to_keep=labels.shape[1] + 1).logits
        logits = logits.unflatten(0, (*labels.shape[:1], -1)) if logits.ndim == 2 else logits
        own = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
        )
        return own.view(labels.shape).sum(1), (labels != IGNORED).sum(1)


@torch.no_grad()
def start_projector(writer: Writer, sounds: Sequence[Sound]) -> None:
    """Least squares from stacked states to embeddings of the tokens that are spoken there, without a pass of the decoder.

    Where in a sound each token lies is not known. At first all take the same time; in every round the borders move to where they
    fit the last round's projection best, in their order.
    """
    projector, table = writer.model.model.multi_modal_projector, writer.model.get_input_embeddings().weight
    stacks = [one.states.reshape(one.tokens, -1).float() for one in sounds]
    ids = [torch.tensor(writer.ids(f" {one.text}")) for one in sounds]
    middle = table[torch.cat(ids).unique()].float().mean(0)
    targets = [WORD_SHARE * (table[own].float() - middle) for own in ids]
    places = [torch.arange(len(stack)) * len(own) // len(stack) for stack, own in zip(stacks, ids, strict=True)]
    inputs = torch.cat(stacks)
    products = inputs.T @ inputs
    unit = len(inputs) * inputs.square().mean() * torch.eye(len(products))

    def fitted(offset: torch.Tensor, ridge: float) -> torch.Tensor:
        due = torch.cat([own[place] for own, place in zip(targets, places, strict=True)]) + offset
        return torch.linalg.solve(products + ridge * unit, inputs.T @ due)

    for _ in range(ROUNDS):
        weight = fitted(torch.zeros(()), LOOSE_RIDGE)
        places = [in_order(torch.cdist(stack @ weight, own).square()) for stack, own in zip(stacks, targets, strict=True)]
    projector.linear_1.weight.copy_(fitted(middle, RIDGE).T)
    projector.linear_2.weight.copy_(torch.eye(len(middle)))


def in_order(costs: torch.Tensor) -> torch.Tensor:
    """For each step its token, in order and none left out, so that the costs `(steps, tokens)` add up to the least.

    Where there are fewer steps than tokens, the last ones are left out.
    """
    steps, tokens = costs.shape
    total = np.full((steps, tokens), np.inf)
    given = costs.double().numpy()
    total[0, 0] = given[0, 0]
    for step in range(1, steps):
        before = np.minimum(total[step - 1], np.concatenate([[np.inf], total[step - 1, :-1]]))
        total[step] = before + given[step]
    token = min(tokens, steps) - 1
    found = [token]
    for step in range(steps - 1, 0, -1):
        if token and total[step - 1, token - 1] <= total[step - 1, token]:
            token -= 1
        found.append(token)
    return torch.tensor(found[::-1])


def batches(sounds: Sequence[Sound], steps: int, seed: int) -> Iterator[list[Sound]]:
    """The same for every kind: all sounds in a new order, again and again, of like length together."""
    random = np.random.default_rng(seed)
    queue: list[int] = []
    for _ in range(-(-steps // ALIKE)):
        while len(queue) < ALIKE * BATCH:
            queue += random.permutation(len(sounds)).tolist()
        own, queue = sorted(queue[: ALIKE * BATCH], key=lambda place: sounds[place].tokens), queue[ALIKE * BATCH :]
        for number in random.permutation(ALIKE):
            yield [sounds[place] for place in own[number * BATCH : (number + 1) * BATCH]]


def train(
    writer: Writer, sounds: Sequence[Sound], choosing: Sequence[Sound], *, steps: int, seed: int, looks: int
) -> tuple[list[float], list[float]]:
    """Train what is between the two to have written what is said; the loss is on the transcript's tokens alone.

    Args:
        writer: of the model.
        sounds: to train on.
        choosing: sounds that are not trained on: of the looks at them, what was least wrong is what stays.
        steps: of training.
        seed: of the sounds' order.
        looks: how often, at even distances, the last time at the end.

    Returns:
        The loss of every step, and that on the sounds for choosing at every look.
    """
    model = writer.model
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, RATE, weight_decay=0.0, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    routed = hf_steer.get_steer_status(model).aligners
    flat = model.lm_head.register_forward_pre_hook(side_by_side)
    model.train()
    losses, seen, best = [], [], []
    for step, own in zip(bar := tqdm(range(1, steps + 1), desc="between", leave=False), batches(sounds, steps, seed), strict=False):
        watch = collect_balance(model) if routed else nullcontext()
        with torch.autocast("cpu", torch.bfloat16), watch as balance:
            wrong, tokens = writer.losses(own, [one.text for one in own])
        loss = wrong.sum() / tokens.sum()
        losses.append(float(loss.detach()))
        (loss if balance is None else loss + balance.loss()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
        if step * looks // steps > (step - 1) * looks // steps:
            with torch.autocast("cpu", torch.bfloat16):
                seen.append(mean_loss(writer, choosing))
            if seen[-1] == min(seen):
                best = [parameter.detach().clone() for parameter in parameters]
    for parameter, value in zip(parameters, best, strict=True):
        parameter.data = value
    flat.remove()
    model.eval()
    return losses, seen


@torch.no_grad()
def mean_loss(writer: Writer, sounds: Sequence[Sound]) -> float:
    """Of the transcripts' tokens; neither a training step nor one that needs labels."""
    training = writer.model.training
    writer.model.eval()
    wrong, tokens = writer.losses(sounds, [one.text for one in sounds])
    writer.model.train(training)
    return float(wrong.sum() / tokens.sum())


@torch.no_grad()
def transcribe(writer: Writer, sounds: Sequence[Sound], *, batch: int = 16) -> list[str]:
    """What the model writes of each sound: the likeliest token at each step, at most as many as the sound could hold."""
    order = sorted(range(len(sounds)), key=lambda place: sounds[place].tokens)
    written = [""] * len(sounds)
    for start in range(0, len(order), batch):
        places = order[start : start + batch]
        given, _ = writer.inputs([sounds[place] for place in places])
        most = most_tokens(max(sounds[place].tokens for place in places))
        out = writer.model.generate(**given, max_new_tokens=most, do_sample=False, eos_token_id=writer.ends)
        said = writer.tokenizer.batch_decode(out[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
        for place, text in zip(places, said, strict=True):
            written[place] = text.strip()
    return written


def most_tokens(stacks: int) -> int:
    """Of a transcript: six a second, and four."""
    return 4 + stacks * 6 * STACKED // 50


@torch.no_grad()
def chosen_among(writer: Writer, sounds: Sequence[Sound], candidates: Sequence[Sequence[str]]) -> list[int]:
    """Which of the candidate transcripts of each sound is the likeliest."""
    found = []
    for one, texts in zip(sounds, candidates, strict=True):
        wrong, _ = writer.losses([one] * len(texts), texts)
        found.append(int(wrong.argmin()))
    return found
