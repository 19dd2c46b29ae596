"""`python -m flash_attention info | check | plan | bench`: hands over to :mod:`flash_attention.tools.cli`."""

import sys

from flash_attention.tools.cli import main

if __name__ == "__main__":
    sys.exit(main())
