"""`python -m tilewright_bench`: the commands of `tilewright_bench.commands`."""

import sys

from tilewright_bench.commands import main

if __name__ == "__main__":
    sys.exit(main())
