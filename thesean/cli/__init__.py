"""The command line."""

from thesean.cli.app import app

__all__ = ["app"]
