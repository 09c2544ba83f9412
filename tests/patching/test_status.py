"""What a patched model tells about itself, and for whom a context holds."""

from __future__ import annotations

import contextvars
import threading

import torch
from kit.gazing import gaze, prompt_for, steer
from kit.tiny import make_model
from transformers import TextIteratorStreamer

import hf_steer
from hf_steer import Saliency, disable_steering, get_steer_status, patch_model, use_saliency


def test_the_status_names_heads_source_and_switch():
    model = make_model("qwen2_vl")
    before = get_steer_status(model)
    assert before == hf_steer.SteerStatus(patched=False, why="the model is not patched; see hf_steer.patch_model")
    patch_model(model, steer("qwen2_vl", heads={1: (0, 3), -1: "all"}, strength={1: {0: 2.0, 3: 0.0}, -1: 1.0}))
    status = get_steer_status(model)
    assert (status.patched, status.enabled, status.family, status.saliency) == (True, True, "qwen2_vl", "vision_attention")
    assert status.heads == {1: (0,), 2: (0, 1, 2, 3)}
    with use_saliency(model, Saliency.from_mask([[1]])):
        assert get_steer_status(model).saliency == "user"
        with disable_steering(model):
            assert not get_steer_status(model).enabled
    assert get_steer_status(model) == status


def test_trainable_parameters_are_printed_in_one_line(capsys):
    model = patch_model(make_model("llama").requires_grad_(False), steer("llama"))
    model.lm_head.requires_grad_(True)
    hf_steer.print_trainable_parameters(model)
    total = sum(parameter.numel() for parameter in model.parameters())
    printed = capsys.readouterr().out
    assert printed == f"steering: 0 parameters | trainable: 3,072 of {total:,} ({100 * 3072 / total:.4f} %)\n"


class Words:
    """Enough of a tokenizer for a streamer."""

    def decode(self, tokens, **_):
        return " ".join(str(int(token)) for token in tokens) + " "


def test_a_streamers_thread_is_steered_when_it_takes_the_context_along():
    model = patch_model(make_model("qwen2"), steer("qwen2", strength=4.0))
    inputs = prompt_for("qwen2", rows=[[9]])
    settings = {"max_new_tokens": 6, "do_sample": False}
    unsteered = model.generate(**inputs, **settings)
    streamer = TextIteratorStreamer(Words(), skip_prompt=True)
    with use_saliency(model, gaze("qwen2", inputs)):
        steered = model.generate(**inputs, **settings)
        call = (contextvars.copy_context().run, lambda: model.generate(**inputs, **settings, streamer=streamer))
        thread = threading.Thread(target=call[0], args=(call[1],))
        thread.start()
        streamed = [int(word) for word in "".join(streamer).split()]
        thread.join()
    assert streamed == steered[0, 9:].tolist()
    assert not torch.equal(steered, unsteered)
