"""A conversion as a checkpoint of its guide's own class: from numbers in a configuration to weights in their places."""
