"""hf-steer: parses, calls, prints. One file per command; `main.COMMANDS` lists them."""

from hf_steer.cli.main import main

__all__ = ["main"]
