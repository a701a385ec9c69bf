"""What the study `matrix` converts: the guides of the paper at small scale, and how each conversion is made."""
