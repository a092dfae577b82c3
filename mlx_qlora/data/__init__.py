"""A file becomes rows, then token ids and labels, then batches."""
