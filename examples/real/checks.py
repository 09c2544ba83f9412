"""Tries what was made: Whisper takes down the readers, SmolLM2 knows the capital of France."""

import time

from recordings import read_recordings
from words import error_rate_of, normal_words

MOST_ERRORS = {"whisper-base": 0.25, "whisper-tiny.en": 0.35}
"""Word error rates that are still right: half of the readers' cards are noisy recordings of a few words."""


def transcribe(folder, sounds, batch=5):
    """What a Whisper folder makes of sounds, in English."""
    import torch
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    processor = WhisperProcessor.from_pretrained(folder, local_files_only=True)
    model = WhisperForConditionalGeneration.from_pretrained(folder, local_files_only=True).eval()
    language = {"language": "en"} if model.generation_config.is_multilingual else {}
    found = []
    for start in range(0, len(sounds), batch):
        inputs = processor(sounds[start : start + batch], sampling_rate=16_000, return_tensors="pt")
        with torch.no_grad():
            tokens = model.generate(inputs.input_features, max_new_tokens=100, **language)
        found += processor.batch_decode(tokens, skip_special_tokens=True)
    return found


def check_whisper(folder, readers):
    """Whether the word error rate on the readers is what it should be, and a line that says it."""
    if readers is None:
        return True, "not tried: the readers are missing"
    found = read_recordings(readers)
    heard = transcribe(folder, [one.samples() for one in found])
    rate = error_rate_of([(normal_words(one.text), normal_words(text)) for one, text in zip(found, heard, strict=True)])
    most = MOST_ERRORS[folder.name]
    return rate < most, f"word error rate {rate:.3f} on {len(found)} sentences of the readers (below {most} is right)"


def check_smollm2(folder):
    """Whether it answers with Paris, and a line that says it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        found = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    answer = tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return "Paris" in answer, f"asked for the capital of France it says {answer!r}"


def check(folders):
    """Tries all that can be tried and prints a line each.

    Returns:
        Names of what failed.
    """
    failed = []
    for name, folder in folders.items():
        start = time.perf_counter()
        if name.startswith("whisper"):
            right, line = check_whisper(folder, folders.get("readers"))
        elif name == "smollm2":
            right, line = check_smollm2(folder)
        else:
            found = read_recordings(folder)
            right, line = bool(found), f"{len(found)} recordings, {sum(one.seconds for one in found) / 60:.1f} minutes"
        print(f"{name}: {'right' if right else 'WRONG'}: {line} [{time.perf_counter() - start:.1f} s]", flush=True)
        if not right:
            failed.append(name)
    return failed
