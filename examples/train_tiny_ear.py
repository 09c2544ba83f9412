"""Train a tiny ear and a tiny mind that have never met, for a bridge between the two to be learned later.

    python examples/train_tiny_ear.py                # writes examples/tiny_ear and examples/tiny_r1_text
    python examples/train_tiny_ear.py --only mind --mind-steps 20 --output /tmp/quick

The ear is a Whisper encoder that hears sounds (CTC over phonemes) in ordinary words and has never heard a digit. The mind is
a Qwen3 that reads hesitant transcripts, thinks, and answers questions about the digits; it has no token for audio. The same
seed gives the same weights.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import spoken_digits as world
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

HERE = Path(__file__).parent
MEL_BINS, MEL_FRAMES = 40, 300
BLANK = "<blank>"
"""Nothing to hear: the symbol of CTC, index 0."""
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
FILLERS = ("um", "er", "well", "uh", "so", "hmm", "like", "okay")
OTHERS = ("user", "assistant", "system", "you", "hear", "i", "a", "of", "is", "and", "please", "say", "number", ".", ",")
QUESTIONS: dict[str, Callable[[str], str]] = {
    "which digits ?": lambda digits: digits,
    "how many ?": lambda digits: str(len(digits)),
    "the first ?": lambda digits: digits[0],
    "the last ?": lambda digits: digits[-1],
    "reversed ?": lambda digits: digits[::-1],
}
"""Question -> the figures of the answer."""
MAIN_QUESTION, MAIN_SHARE = "which digits ?", 0.5
MOST_REPEATS, MOST_FILLERS = 6, 3
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def fit(model: torch.nn.Module, loss_of: Callable[[], torch.Tensor], *, name: str, steps: int, rate: float) -> float:
    """AdamW with warm-up and cosine decay; returns the mean loss over the last tenth."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.02, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=max(steps, 2), pct_start=0.1)
    losses = []
    model.train()
    progress = tqdm(range(steps), desc=name, unit="step")
    for _ in progress:
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss))
        progress.set_postfix(loss=f"{np.mean(losses[-50:]):.4f}")
    model.eval()
    return float(np.mean(losses[-max(1, steps // 10) :]))


def edit_distance(said: Sequence[Any], meant: Sequence[Any]) -> int:
    """Insertions, deletions and substitutions that lead from one to the other."""
    row = list(range(len(meant) + 1))
    for index, left in enumerate(said, 1):
        corner, row[0] = row[0], index
        for place, right in enumerate(meant, 1):
            corner, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, corner + (left != right))
    return row[-1]


def build_ear(sounds: Sequence[str]) -> tuple[WhisperForConditionalGeneration, WhisperFeatureExtractor]:
    """An encoder and a head; Whisper's decoder has no layers, its tied embedding is the head of CTC."""
    symbols = [BLANK, *sounds]
    config = WhisperConfig(
        vocab_size=len(symbols), num_mel_bins=MEL_BINS, max_source_positions=MEL_FRAMES // 2, max_target_positions=16,
        d_model=96, encoder_layers=3, encoder_attention_heads=4, encoder_ffn_dim=384,
        decoder_layers=0, decoder_attention_heads=4, decoder_ffn_dim=384, dropout=0.0, init_std=0.06,
        pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=0,
        id2label=dict(enumerate(symbols)), label2id={symbol: index for index, symbol in enumerate(symbols)},
    )
    extractor = WhisperFeatureExtractor(feature_size=MEL_BINS, chunk_length=world.LONGEST_SECONDS)
    return WhisperForConditionalGeneration(config), extractor


class Lessons:
    """Word sequences in the voices of a split, as the extractor shows them to the ear."""

    def __init__(self, extractor: WhisperFeatureExtractor, symbols: dict[str, int], *, split: str, count: int, seed: int) -> None:
        sounds = world.phonemes_of(world.OTHER_WORDS)
        self.random = np.random.default_rng(seed)
        self.mels = torch.empty(count, MEL_BINS, MEL_FRAMES, dtype=torch.float16)
        self.frames = torch.empty(count, dtype=torch.long)
        self.targets = []
        sequences = world.sample_words(split, count, seed)
        for index, (words, audio) in enumerate(tqdm(sequences, desc=f"{split} mels", unit="sequence")):
            seen = extractor(audio, sampling_rate=world.SAMPLING_HZ, return_attention_mask=True, return_tensors="pt")
            self.mels[index] = seen["input_features"][0]
            self.frames[index] = (int(seen["attention_mask"].sum()) + 1) // 2
            self.targets.append([symbols[sound] for word in words for sound in sounds[word]])

    def loss(self, model: WhisperForConditionalGeneration, batch: int) -> torch.Tensor:
        chosen = self.random.integers(0, len(self.targets), batch)
        logits = hear(model, self.mels[chosen])
        targets = [self.targets[index] for index in chosen]
        lengths = torch.tensor([len(target) for target in targets])
        spoken = torch.tensor([sound for target in targets for sound in target])
        return functional.ctc_loss(logits.log_softmax(-1).transpose(0, 1), spoken, self.frames[chosen], lengths, zero_infinity=True)

    @torch.no_grad()
    def error_fraction(self, model: WhisperForConditionalGeneration) -> float:
        """Edit distance over the number of sounds, taking the likeliest symbol of each frame."""
        wrong = 0
        for index, target in enumerate(self.targets):
            best = hear(model, self.mels[index : index + 1])[0, : self.frames[index]].argmax(-1)
            wrong += edit_distance([symbol for symbol in torch.unique_consecutive(best).tolist() if symbol], target)
        return wrong / sum(map(len, self.targets))


def hear(model: WhisperForConditionalGeneration, mels: torch.Tensor) -> torch.Tensor:
    """Logits `(batch, frames, symbols)`, 50 frames a second."""
    return model.proj_out(model.model.encoder(mels.float()).last_hidden_state)


def train_ear(output: Path, *, seed: int, steps: int, batch: int, rate: float, sequences: int) -> dict[str, Any]:
    started = time.perf_counter()
    torch.manual_seed(seed)
    sounds = world.phonemes_of(world.OTHER_WORDS)
    model, extractor = build_ear(sorted({sound for word in sounds.values() for sound in word}))
    symbols = model.config.label2id
    lessons = Lessons(extractor, symbols, split="training", count=sequences, seed=seed)
    loss = fit(model, lambda: lessons.loss(model, batch), name="ear", steps=steps, rate=rate)
    model.save_pretrained(output)
    extractor.save_pretrained(output)
    exam = Lessons(extractor, symbols, split="validation", count=min(200, sequences), seed=seed + 1)
    return {
        "seed": seed, "steps": steps, "batch": batch, "rate": rate, "sequences": sequences, "final_loss": round(loss, 4),
        "phoneme_error_fraction": round(exam.error_fraction(model), 4), **size_and_time(model, started),
    }


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; no token stands for audio."""
    asked = sorted({word for question in QUESTIONS for word in question.split()})
    words = [*SPECIAL, "<unk>", *world.DIGIT_WORDS, *map(str, range(10)), *FILLERS, *asked, *OTHERS]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL[:3]))
    tokenizer.add_tokens(list(SPECIAL[3:]))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL[0], eos_token=SPECIAL[2], unk_token="<unk>", padding_side="left",
        chat_template=CHAT_TEMPLATE, model_max_length=512,
    )


def build_mind(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A Qwen3: beside a Qwen2, transformers 5's AutoTokenizer would read every vocabulary with Qwen2's own tokenizer."""
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=24, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.08,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_new_tokens=16, do_sample=False
    )
    return model


def hesitate(digits: str, random: np.random.Generator) -> str:
    """A noisy transcript: a repeated word is hesitation, unless a filler stands between."""
    pauses = random.integers(0, MOST_FILLERS + 1, len(digits) + 1)
    repeats = random.integers(1, MOST_REPEATS + 1, len(digits))
    words: list[str] = []
    for place, digit in enumerate(digits):
        again = place > 0 and digits[place - 1] == digit
        words += random.choice(FILLERS, max(int(pauses[place]), int(again))).tolist()
        words += [world.DIGIT_WORDS[int(digit)]] * int(repeats[place])
    return " ".join([*words, *random.choice(FILLERS, int(pauses[-1])).tolist()])


def reply_to(question: str, digits: str) -> str:
    """What the mind is to say after `<think>`: what it read, then the answer."""
    thought = " ".join(world.DIGIT_WORDS[int(digit)] for digit in digits)
    return f"{thought} </think> {' '.join(QUESTIONS[question](digits))}{SPECIAL[2]}"


class Conversations:
    """Questions about hesitant transcripts of the strings of a split."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, split: str, seed: int) -> None:
        self.tokenizer, self.random = tokenizer, np.random.default_rng(seed)
        self.strings = [world.strings_of(split, length) for length in range(1, len(world.LENGTH_SHARES) + 1)]

    def draw(self) -> tuple[str, str]:
        """Prompt and reply."""
        choices = self.strings[int(self.random.choice(len(self.strings), p=world.LENGTH_SHARES))]
        digits = choices[int(self.random.integers(len(choices)))]
        rare = [question for question in QUESTIONS if question != MAIN_QUESTION]
        question = MAIN_QUESTION if self.random.random() < MAIN_SHARE else str(self.random.choice(rare))
        messages = [{"role": "user", "content": f"{hesitate(digits, self.random)} {question}"}]
        prompt = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return prompt, reply_to(question, digits)

    def loss(self, model: Qwen3ForCausalLM, batch: int) -> torch.Tensor:
        """Cross-entropy of the replies."""
        rows = [[self.tokenizer(part, add_special_tokens=False)["input_ids"] for part in self.draw()] for _ in range(batch)]
        longest = max(len(prompt) + len(reply) for prompt, reply in rows)
        padded = [(prompt + reply, [-100] * len(prompt) + reply, longest - len(prompt) - len(reply)) for prompt, reply in rows]
        input_ids = torch.tensor([ids + [self.tokenizer.pad_token_id] * gap for ids, _, gap in padded])
        labels = torch.tensor([labels + [-100] * gap for _, labels, gap in padded])
        logits = model(input_ids=input_ids).logits[:, :-1]
        return functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())

    @torch.no_grad()
    def right_fraction(self, model: Qwen3ForCausalLM, count: int) -> float:
        """Of replies that are right to the last token, thought included, under greedy decoding."""
        prompts, replies = zip(*(self.draw() for _ in range(count)), strict=True)
        inputs = self.tokenizer(list(prompts), return_tensors="pt", padding=True, return_token_type_ids=False)
        said = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :].tolist()
        meant = [self.tokenizer(reply)["input_ids"] for reply in replies]
        return sum(row[: len(ids)] == ids for row, ids in zip(said, meant, strict=True)) / count


def train_mind(output: Path, *, seed: int, steps: int, batch: int, rate: float) -> dict[str, Any]:
    started = time.perf_counter()
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_mind(tokenizer)
    lessons = Conversations(tokenizer, split="training", seed=seed)
    loss = fit(model, lambda: lessons.loss(model, batch), name="mind", steps=steps, rate=rate)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    exam = Conversations(tokenizer, split="validation", seed=seed + 1)
    return {
        "seed": seed, "steps": steps, "batch": batch, "rate": rate, "final_loss": round(loss, 4),
        "right_fraction": round(exam.right_fraction(model, 400), 4), **size_and_time(model, started),
    }


def size_and_time(model: torch.nn.Module, started: float) -> dict[str, Any]:
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "training_seconds": round(time.perf_counter() - started), "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE, help="folder for tiny_ear and tiny_r1_text")
    parser.add_argument("--only", choices=("ear", "mind"), help="train one of the two")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ear-steps", type=int, default=900)
    parser.add_argument("--ear-batch", type=int, default=32)
    parser.add_argument("--ear-rate", type=float, default=2e-3)
    parser.add_argument("--ear-sequences", type=int, default=4000)
    parser.add_argument("--mind-steps", type=int, default=3600)
    parser.add_argument("--mind-batch", type=int, default=32)
    parser.add_argument("--mind-rate", type=float, default=3e-3)
    given = vars(parser.parse_args())
    for name, folder, train in (("ear", "tiny_ear", train_ear), ("mind", "tiny_r1_text", train_mind)):
        if given["only"] in (None, name):
            settings = {key.removeprefix(f"{name}_"): value for key, value in given.items() if key.startswith(f"{name}_")}
            facts = train(given["output"] / folder, seed=given["seed"], **settings)
            (given["output"] / folder / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
            print(json.dumps(facts))


if __name__ == "__main__":
    main()
