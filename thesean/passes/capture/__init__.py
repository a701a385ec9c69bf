"""Guide -> FX graph and calling convention, checked against the guide."""
