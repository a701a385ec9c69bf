"""lm-eval's command where conversions' folders are known; takes what `lm_eval` takes:

python -m thesean.hf.lm_eval run --model hf --model_args pretrained=hub/small --include_path tasks --tasks mine

What is served is asked by lm-eval's own `--model onnxruntime-genai`, of a folder that `export(runtime="genai")` wrote.
"""

from __future__ import annotations

import sys

import thesean.hf  # noqa: F401  the Auto classes know folders of conversions from here on
from thesean.errors import MissingExtraError


def main() -> None:
    """Raises MissingExtraError."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise MissingExtraError("lm-eval", "eval") from error
    cli_evaluate()


if __name__ == "__main__":
    try:
        main()
    except MissingExtraError as error:
        sys.exit(str(error))
