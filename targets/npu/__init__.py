"""Systolic arrays described in YAML: circuit, host code and cycles follow from the description."""
