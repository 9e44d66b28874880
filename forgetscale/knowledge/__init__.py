"""What tuning did to a model and its knowledge, and undoing part of it: passes over files."""
