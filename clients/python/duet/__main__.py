"""`python -m duet` is the command `duet`."""

import sys

from duet.cli.main import main

sys.exit(main())
