"""External tools that every family shares: compilers, linkers, TVM's runtime libraries and the bundle's runner."""
