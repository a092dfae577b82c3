"""What `mlx-qlora doctor` looks at: each check yields findings."""
