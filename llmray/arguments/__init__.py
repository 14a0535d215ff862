"""Arguments: frozen, typed, free of machine-learning libraries."""
