"""The output folder: written atomically, opened, executed and verified."""
