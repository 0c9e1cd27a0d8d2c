"""What runs on a machine with a GPU, prepared on one without."""
