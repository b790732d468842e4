"""Hard negatives for retrieval, mined offline and fixed (paper section 3.2). See `python -m pipelines.mine --help`."""
