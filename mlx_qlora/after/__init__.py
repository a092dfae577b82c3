"""After a run: what the model learned, and the report."""
