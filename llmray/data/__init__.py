"""From rows of a data set to batches: sources, conversations, templates, features, shards."""
