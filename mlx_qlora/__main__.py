"""`python -m mlx_qlora` is the command line."""

import sys

from mlx_qlora.cli import main

sys.exit(main())
