"""`python -m thesean`, the same as the command."""

from thesean.cli import app

if __name__ == "__main__":
    app()
