"""The only reader of untrusted bytes: models, data and user scripts."""
