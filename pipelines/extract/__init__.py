"""Images -> a feature store, through a detector: `python -m pipelines.extract IMAGES DST`."""
