"""What `studies/rivals.py` is made of: two guides with their data, each rival's start, and how rivals are trained."""
