"""External tools that every family shares: compilers, linkers, TVM's runtime libraries, the runner."""
