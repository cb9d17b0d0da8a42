"""From published data sets to batches: converters, shards, streams."""
