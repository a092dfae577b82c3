"""`python -m mlx_qlora.train` is `mlx-qlora train`."""

import sys

from mlx_qlora.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
