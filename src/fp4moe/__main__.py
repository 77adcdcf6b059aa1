"""`python -m fp4moe`: the same as the command `fp4moe`."""

import sys

from .tools.cli import main

sys.exit(main())
