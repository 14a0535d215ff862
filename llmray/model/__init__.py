"""Models: loading, tuning methods, flat attention, the head that returns log-probabilities, saving."""
