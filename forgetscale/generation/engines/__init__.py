"""What runs the model for a generation worker."""
