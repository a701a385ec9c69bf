"""A conversion as one self-contained page of HTML."""
