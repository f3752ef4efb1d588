"""`python -m rev2net`, which is also what `deepspeed --module rev2net` starts."""

import sys

from rev2net.cli import main

sys.exit(main())
