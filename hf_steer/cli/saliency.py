"""`hf-steer saliency`: what a model looks at in a picture, a sound or a text, by every source."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from hf_steer.cli.command import Command, add_heads, add_list, add_model, add_output, add_prompt
from hf_steer.cli.kinds import read_heads, refuse_list_of_other, word
from hf_steer.cli.own import load_own, load_processor
from hf_steer.errors import ConfigError

SOUND = ".wav"

DESCRIPTION = """\
Draw what a vision-language model looks at in a picture: one overlay per source of saliency, raw, before it is normalised.

  vision_attention    attention that each token receives in the vision tower (--blocks chooses which blocks)
  vision_rollout      the same, followed through the tower's blocks
  feature_norm        length of what the projector hands on
  text_similarity     mean cosine with the prompt's text
  decoder_attention   what the decoder's heads look at from the prompt's last token (--heads; all of them by default)
  gradient            gradient x input of the answer's logit (--answer; the likeliest next token by default)

Without a picture the model looks at --prompt alone, token by token, and of a sound (a WAV file) moment by moment: by
decoder_attention and gradient, and in a sound also by feature_norm and text_similarity; decoders that read an encoder across
(Whisper) by decoder_attention.

To steer by one of them: SaliencyConfig(source="...") in AttentionConfig. Where they differ, `hf-steer sweep` with your own
pictures says which one helps. Nothing is trained or saved but the pictures and saliency.json.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "image", metavar="IMAGE", type=Path, nargs="?",
        help="a picture, in any format that Pillow reads, or a sound, a WAV file (default: none, the prompt alone)",
    )  # fmt: skip
    add_model(parser)
    add_prompt(parser, "Describe the picture.")
    add_list(parser, "--sources", word, "NAME", "of those above (default: all)", former="--source")
    add_list(parser, "--blocks", word, "N", 'of the vision tower, from 0, or "all" (default: the source\'s own)')
    add_heads(parser, "decoder heads that look")
    parser.add_argument("--answer", metavar="TEXT", help="its first token is the gradient's answer (default: the likeliest token)")
    parser.add_argument(
        "--provider", metavar="MODEL", help="a Qwen2-VL whose eyes are drawn, too, on this model's tokens (default: none)"
    )
    add_output(parser, "saliency", "saliency.png and saliency.json")


def run(arguments: argparse.Namespace) -> int:
    from transformers.utils import logging

    from hf_steer.analysis.overlays import draw_sources

    logging.disable_progress_bar()  # of weight loading
    heads = read_heads(arguments.heads)
    if arguments.image is None or arguments.image.suffix.lower() == SOUND:
        seen = _stretches(arguments, None if heads == "all" else heads)
        print(json.dumps(seen.to_dict()) if arguments.json else seen)
        return 0
    drawn = draw_sources(
        arguments.image,
        model=arguments.model,
        prompt=arguments.prompt,
        sources=arguments.sources,
        blocks=None if arguments.blocks is None else ",".join(arguments.blocks),
        heads=None if heads == "all" else heads,
        answer=arguments.answer,
        provider=arguments.provider,
        output=arguments.output,
    )
    if arguments.json:
        print(json.dumps(drawn.to_dict()))
    else:
        print(drawn)
    return 0


def _stretches(arguments: argparse.Namespace, heads: Any) -> Any:
    """Of a text or a sound."""
    from hf_steer.analysis.asked import Reader
    from hf_steer.analysis.stretches import see_sound, see_text, write_stretches

    if arguments.model is None:
        raise ConfigError("the embedded model looks at pictures; name one, or a model of your own with --model.")
    given = [name for name in ("blocks", "provider") if getattr(arguments, name) is not None]
    if given:
        raise ConfigError(f"{' and '.join(f'--{name}' for name in given)} is for pictures; leave it out.")
    model = load_own(arguments.model, device="cpu")
    refuse_list_of_other(arguments.heads, model)
    reader = Reader(load_processor(arguments.model), model)
    how: dict[str, Any] = {"sources": arguments.sources, "heads": heads, "answer": arguments.answer}
    if arguments.image is None:
        names, found = see_text(model, reader, arguments.prompt, **how)
    else:
        names, found = see_sound(model, reader, arguments.image, arguments.prompt, **how)
    what = arguments.prompt if arguments.image is None else f"{arguments.image.name}: {arguments.prompt}"
    return write_stretches(Path(arguments.model).name, names, found, arguments.output, title=what)


SALIENCY = Command("saliency", "what a model looks at", DESCRIPTION, add_arguments, run)
