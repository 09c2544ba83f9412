"""`python -m hf_steer.cli` is `hf-steer`."""

import sys

from hf_steer.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
