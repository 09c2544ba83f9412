"""`hf-steer saliency`: what a model looks at in a picture, by every source, as overlays."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hf_steer.cli.command import Command, heads

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
    parser.add_argument("image", metavar="IMAGE", type=Path, help="a picture")
    parser.add_argument("--model", metavar="MODEL", help="folder or Hub repository (default: the embedded model)")
    parser.add_argument("--prompt", default="Describe the picture.", help="question about it (default: %(default)s)")
    parser.add_argument("--source", action="append", metavar="NAME", help="which source; may be repeated (default: all)")
    parser.add_argument("--blocks", help="vision blocks with commas between them, or all (default: the source's own)")
    parser.add_argument("--heads", type=heads, metavar="JSON", help='decoder heads that look: {"3": [0, 5]} (default: all)')
    parser.add_argument("--answer", help="text whose first token is the gradient's answer")
    parser.add_argument("--provider", metavar="MODEL", help="a Qwen2-VL whose eyes are drawn, too, on this model's tokens")
    parser.add_argument(
        "--output", type=Path, default=Path("hf_steer_saliency"), metavar="DIR", help="for the pictures (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    from transformers.utils import logging

    from hf_steer.analysis.overlays import draw_sources

    logging.disable_progress_bar()  # of weight loading
    drawn = draw_sources(
        arguments.image,
        model=arguments.model,
        prompt=arguments.prompt,
        sources=arguments.source,
        blocks=arguments.blocks,
        heads=arguments.heads,
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
