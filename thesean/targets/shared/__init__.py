"""What the families share: the facts of a part, the base modules, options, the registry."""
