"""Videos to shards, shards to batches."""
