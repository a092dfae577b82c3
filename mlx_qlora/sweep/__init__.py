"""Which learning rate, rank and batch: short runs of one model on one data set, compared."""
