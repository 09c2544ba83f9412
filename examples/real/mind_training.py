"""The tower and SmolLM2 joined: what is trained between the two, and what the joined model answers."""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from mind_scenes import SIDE_PX, Painter, Scene
from mind_tower import names_of_patches, pixels_of
from tqdm.auto import tqdm
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import hf_steer
from hf_steer import AlignerConfig, AttentionConfig, Saliency, SaliencyConfig
from hf_steer.training import collect_balance

QUESTION = "What is it?"
PROMPT = f"<|im_start|>user\nPicture:<image>\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
BEFORE, AFTER = "The picture shows a", ".<|im_end|>"
ANSWER, ANSWER_TOKENS = re.compile(r"The picture shows an? (\w+)\."), 8
Box = tuple[int, int, int, int]
Look = Callable[[int], Saliency]
LINEAR = "linear alone"
KINDS: dict[str, dict[str, Any]] = {
    LINEAR: {},
    "simple": {"kind": "simple", "num_experts": 8},
    "hierarchical": {"kind": "hierarchical", "num_experts": 8, "num_global_experts": 4},
    "progressive": {"kind": "progressive", "num_experts": 8, "num_stages": 3},
}
"""What stands between the two; every aligner is trained together with a linear projection."""
LOADED: dict[str, Any] = {"dtype": torch.bfloat16, "attn_implementation": "eager"}
"""Backward, eager attention in bfloat16 takes two thirds of the time of SDPA on a CPU, for prompts as short as these."""
SINGLE_SHARE = 0.3
BATCH, RATE = 16, 1e-3
WORD_SHARE = 0.7
"""Of a word's embedding, the rest is the mean of all: where the projection starts for a patch of that name."""


def join(tower: Path, mind: Path, kind: str, *, strength: float) -> tuple[Any, Any]:
    """One model in bfloat16, with every head within reach of a gaze; what is trained is in float32."""
    decoder = AutoModelForCausalLM.from_pretrained(mind, **LOADED)
    seeing = AutoModel.from_pretrained(tower, **LOADED)  # eager, too, as the whole will be loaded: SDPA rounds otherwise
    saliency = SaliencyConfig(source=None, normalize="none", preserve_mass=True)
    attention = AttentionConfig(heads="all", strength=strength, saliency=saliency, queries="all")
    aligner = AlignerConfig(modality="image", placement="output", **KINDS[kind]) if KINDS[kind] else None
    model, processor = hf_steer.compose(
        seeing, decoder, tokenizer=AutoTokenizer.from_pretrained(mind), feature_extractor=processor_in(tower), aligner=aligner,
        attention=attention,
    )  # fmt: skip
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model, processor


def processor_in(tower: Path) -> Any:
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(tower)


def word_ids(processor: Any, names: Sequence[str]) -> torch.Tensor:
    """The token that each name is, after "a"."""
    ids = [processor.tokenizer(f" {name}", add_special_tokens=False)["input_ids"] for name in names]
    assert all(len(one) == 1 for one in ids), [name for name, one in zip(names, ids, strict=True) if len(one) != 1]
    return torch.tensor(ids)[:, 0]


@torch.no_grad()
def start_projector(model: Any, words: torch.Tensor, painter: Painter, *, count: int) -> None:
    """Least squares from the tower's states to the words' embeddings: where training starts, without a pass of the decoder.

    Args:
        model: joined.
        words: ids of the names.
        painter: of training scenes.
        count: scenes.
    """
    scenes = [painter.four("training") for _ in range(count)]
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    pixels = pixels_of(scenes).to(next(tower.parameters()).dtype)
    layer = model.config.vision_feature_layer
    states = torch.cat(
        [tower(part, output_hidden_states=True).hidden_states[layer].flatten(0, 1).double() for part in pixels.split(100)]
    )
    spoken = model.get_input_embeddings().weight[words].double()
    middle, labels = spoken.mean(0), names_of_patches(scenes).flatten()
    targets = torch.where((labels >= 0)[:, None], WORD_SHARE * (spoken[labels.clamp(min=0)] - middle), torch.zeros(()).double())
    centre = states.mean(0)
    apart = states - centre
    ridge = 1e-3 * apart.square().mean() * len(apart) * torch.eye(apart.shape[1]).double()
    weight = torch.linalg.solve(apart.T @ apart + ridge, apart.T @ targets)
    projector.linear_1.weight.copy_(weight.T)
    projector.linear_1.bias.copy_(middle + targets.mean(0) - centre @ weight)
    projector.linear_2.weight.copy_(torch.eye(len(middle)))
    projector.linear_2.bias.zero_()


def train(model: Any, processor: Any, names: Sequence[str], painter: Painter, *, steps: int) -> list[float]:
    """Train what is between the two to name what is there; of four things any, and no place is ever said.

    The loss is on the answer's tokens alone. The word's own is against all names in the picture alike.
    """
    words = word_ids(processor, names)
    before, after = (processor.tokenizer(part, add_special_tokens=False)["input_ids"] for part in (BEFORE, AFTER))
    prompt = processor(text=PROMPT, images=[painter.one().image], return_tensors="pt")["input_ids"][0].tolist()
    place = len(before)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, RATE, weight_decay=0.0, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    model.train()
    flat = model.lm_head.register_forward_pre_hook(side_by_side)
    losses = []
    for _ in (bar := tqdm(range(steps), desc="between", leave=False)):
        scenes = [painter.one() if painter.random.random() < SINGLE_SHARE else painter.four("training") for _ in range(BATCH)]
        said = [int(painter.random.choice(scene.names)) for scene in scenes]
        answers = torch.tensor([[*before, int(words[name]), *after] for name in said])
        ids = torch.cat([torch.tensor([prompt] * BATCH), answers], 1)
        watch = collect_balance(model) if hf_steer.get_steer_status(model).aligners else nullcontext()
        with torch.autocast("cpu", torch.bfloat16), watch as balance:
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels_of(scenes)}
            logits = model(**given, use_cache=False, logits_to_keep=answers.shape[1] + 1).logits
        logs = logits.unflatten(0, (BATCH, -1))[:, :-1].float().log_softmax(-1)
        gold = logs.gather(-1, answers[..., None])[..., 0]
        there = torch.stack([logs[row, place, words[list(scene.names)]].mean() for row, scene in enumerate(scenes)])
        loss = -(gold.sum(1) - gold[:, place] + there).mean() / answers.shape[1]
        loss = loss if balance is None else loss + balance.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    flat.remove()
    model.eval()
    return losses


def side_by_side(head: torch.nn.Module, states: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """Rows of all prompts below each other: a batched product would copy the table of words for each prompt, in bfloat16."""
    return (states[0].flatten(0, 1).contiguous(),)


def look_into(box: Box) -> Look:
    """A gaze into a box, of any row of a batch."""
    return lambda row: Saliency.from_boxes(box, (SIDE_PX, SIDE_PX), row=row)


@torch.no_grad()
def answers_of(
    model: Any, processor: Any, scenes: Sequence[Scene], looks: Sequence[Look] | None = None, *, batch: int = 50
) -> list[str]:
    """What the model says of each scene, with a gaze for each, or unsteered."""
    said: list[str] = []
    for start in range(0, len(scenes), batch):
        part = scenes[start : start + batch]
        inputs = processor(text=[PROMPT] * len(part), images=[scene.image for scene in part], return_tensors="pt")
        gaze = nullcontext()
        if looks is not None:
            rows = [look(row) for row, look in enumerate(looks[start : start + batch])]
            gaze = hf_steer.use_saliency(model, functools.reduce(operator.add, rows))
        with gaze:
            out = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
        said += processor.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return said


def named(answer: str) -> str | None:
    """The word that an answer names; None where it says something else."""
    found = ANSWER.match(answer)
    return None if found is None else found[1]
