"""`python -m othello_gpt` is `othello-gpt`."""

import sys

from othello_gpt.cli import main

sys.exit(main())
