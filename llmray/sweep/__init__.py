"""A sweep without what runs it: its trials, and what comes out of them."""
