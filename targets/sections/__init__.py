"""Sections of the profile schema that only some families have."""
