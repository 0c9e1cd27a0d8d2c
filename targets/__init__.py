"""Target profiles and the families of machines they describe."""
