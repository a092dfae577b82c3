"""`python -m mlx_qlora.train` is `mlx-qlora train`."""

import sys

from mlx_qlora.cli import train_main

sys.exit(train_main())
