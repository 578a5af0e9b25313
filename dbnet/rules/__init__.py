"""Update rules of the shards: one file, one kind."""
