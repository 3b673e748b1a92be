"""`python -m megatron_r1z`: the command line, and what every rank runs."""

import sys

from megatron_r1z.cli import main

if __name__ == "__main__":
    sys.exit(main())
