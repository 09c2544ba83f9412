"""`hf-steer saliency`: what a model looks at in a picture, by every source, as overlays."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hf_steer.cli.command import Command, add_heads, add_list, add_model, add_output, add_prompt
from hf_steer.cli.kinds import read_heads, word

DESCRIPTION = """\
Draw what a vision-language model looks at in a picture: one overlay per source of saliency, raw, before it is normalised.

  vision_attention    attention that each token receives in the vision tower (--blocks chooses which blocks)
  vision_rollout      the same, followed through the tower's blocks
  feature_norm        length of what the projector hands on
  text_similarity     mean cosine with the prompt's text
  decoder_attention   what the decoder's heads look at from the prompt's last token (--heads; all of them by default)
  gradient            gradient x input of the answer's logit (--answer; the likeliest next token by default)

To steer by one of them: SaliencyConfig(source="...") in AttentionConfig. Where they differ, `hf-steer sweep` with your own
pictures says which one helps. Nothing is trained or saved but the pictures and saliency.json.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE", type=Path, help="a picture, in any format that Pillow reads")
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


SALIENCY = Command("saliency", "what a model looks at in a picture", DESCRIPTION, add_arguments, run)
