"""Ray around the training core; the only package that imports ray."""
