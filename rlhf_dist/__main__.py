"""`python -m rlhf_dist` is the same as `rlhf-dist`."""

import sys

from rlhf_dist.cli.main import main

sys.exit(main())
