"""From an integer Program to object files, by TVM."""
