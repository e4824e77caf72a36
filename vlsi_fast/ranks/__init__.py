"""The few places that know of several processes: shards, their loading, other numbers of ranks, ranks that died."""
