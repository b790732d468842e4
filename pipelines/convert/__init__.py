"""Published feature formats -> a feature store: `python -m pipelines.convert FORMAT SRC DST`."""
