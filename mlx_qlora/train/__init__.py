"""A batch becomes gradients, then new weights, then a run."""
