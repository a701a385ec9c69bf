"""What the measures share: checks, rows, centring, sums over batches, the registry."""
