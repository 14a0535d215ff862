"""Models: loading, tuning methods, flat attention, the head with log-probabilities, saving."""
