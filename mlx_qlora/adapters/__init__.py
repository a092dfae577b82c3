"""The adapter in every format that others read."""
