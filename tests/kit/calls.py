"""Calls of attention functions, for tests that hold a backend against its oracle."""

from __future__ import annotations

from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_steer.attention import BACKENDS, AttentionCall


def call_of(module, query, key, value, mask, bias, *, implementation="sdpa", kwargs=None, inner=sdpa_attention_forward):
    """A call with its options by transformers' names."""
    return AttentionCall(module, inner, implementation, query, key, value, mask, bias, kwargs or {})


def attend_with(backend, inner, module, query, key, value, mask, bias, **options):
    """Output and weights of a backend over an attention function."""
    implementation = "eager" if inner.__name__.startswith("eager") else "sdpa"
    call = call_of(module, query, key, value, mask, bias, implementation=implementation, kwargs=options, inner=inner)
    return BACKENDS[backend].attend(call, bias)
