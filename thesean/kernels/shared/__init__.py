"""What the kernels share: dispatch, precision, launch tables, Triton's common tiles."""
