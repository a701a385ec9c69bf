"""Trained networks that install by name, with data that is like what they were trained on."""
