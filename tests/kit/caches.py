"""Caches of every kind."""

from __future__ import annotations

from transformers import DynamicCache, StaticCache


def cache_for(model, static=False):
    config = model.config.get_text_config()
    return StaticCache(config=config, max_cache_len=40) if static else DynamicCache(config=config)
