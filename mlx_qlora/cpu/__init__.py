"""Only for CPUs: a fast BLAS, attention in blocks, cheap exponentials."""
