"""The bit-exact numpy reference of the integer program."""
