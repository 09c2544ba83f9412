"""`hf-steer verify`: what a model keeps of hf_steer's promises."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hf_steer.cli.command import Command, add_device, add_list
from hf_steer.cli.kinds import check_device, one_of

CHECKS = ("identity", "receipt", "backend", "no leak", "padding", "decoding", "beams", "saved", "aligners", "undone")
"""`hf_steer.verify.PROMISES`, without importing torch for `--help`."""

DESCRIPTION = """\
Verify on a model, as it lies there, what hf_steer promises. With a steering beside it (steer_config.json), or with --config, that
is what is verified; else a gaze of all heads is made for it, and aligners where it has a place for them.

  identity   with strengths of 0 outputs are bit-equal
  receipt    the heads that were named are steered, no others, and it shows
  backend    sampled heads agree with the formula in float64
  no leak    a later token changes no earlier output
  padding    padding changes no output
  decoding   steps on a cache equal what is computed anew
  beams      beams are steered like rows of their own
  saved      saved and loaded gives bit-equal outputs
  aligners   fresh aligners leave outputs bit-equal
  undone     without the patch all is as before, and outputs are bit-equal

It takes 40 forward passes at most, on two short prompts; a model that looks at pictures gets one that is drawn, or --image; one
that reads only sounds (Whisper) gets two of tones. Nothing is trained or saved. The status is 0 where all that could be shown
holds, 1 where a promise is broken or nothing could be shown.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", help="folder or Hub repository (default: the embedded model)")
    parser.add_argument(
        "--config", metavar="DIR", help="folder or Hub repository of a saved steering (default: the one beside the model, if any)"
    )
    parser.add_argument(
        "--image", type=Path, action="append", metavar="FILE",
        help="a picture for its prompts; give it again for each further one (default: a drawn one)",
    )  # fmt: skip
    parser.add_argument("--prompt", metavar="TEXT", help="a text for its prompts (default: two short ones)")
    add_list(parser, "--checks", one_of(CHECKS), "NAME", "of those above (default: all)")
    add_device(parser)


def run(arguments: argparse.Namespace) -> int:
    from transformers.utils import logging

    from hf_steer.embedded import embedded_model_dir
    from hf_steer.saliency import open_upright
    from hf_steer.verify.loaded import load_to_verify
    from hf_steer.verify.model import verify

    logging.disable_progress_bar()  # of weight loading; the checks have a bar of their own
    check_device(arguments.device)
    pictures = [open_upright(path).convert("RGB") for path in arguments.image or ()]
    loaded = load_to_verify(
        arguments.model or embedded_model_dir(), config=arguments.config, pictures=pictures, prompt=arguments.prompt,
        device=arguments.device,
    )  # fmt: skip
    report = verify(loaded.model, loaded.inputs, tokenizer=loaded.tokenizer, only=arguments.checks)
    print(json.dumps(report.to_dict()) if arguments.json else report)
    return 0 if report.holds else 1


VERIFY = Command("verify", "what a model keeps of the promises", DESCRIPTION, add_arguments, run)
