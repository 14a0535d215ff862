"""What people and programs talk to: the terminal chat."""
