"""What an export writes in place of a core, one file per operation: the file name is the registry."""
