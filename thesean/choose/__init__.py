"""Choosing targets under a budget: candidates, what they cost, what they lose, and the best that fits."""
