"""Conversions at home in Hugging Face's ecosystem: folders that `transformers` reads, and checkpoints of its classes.

thesean.hf.save_pretrained(converted, "folder", tokenizer=tokenizer)
model = AutoModelForCausalLM.from_pretrained("folder")  # where thesean.hf was imported
"""

from thesean.hf.installed import require_transformers

require_transformers()

from thesean.hf.config import TheseanConfig  # noqa: E402  the line above says what is missing
from thesean.hf.folder import save_pretrained  # noqa: E402
from thesean.hf.load import from_converted, from_pretrained  # noqa: E402
from thesean.hf.modeling import TheseanForCausalLM, TheseanForSequenceClassification, TheseanModel  # noqa: E402
from thesean.hf.native.native import save_native, to_native  # noqa: E402
from thesean.hf.states import CarriedStates  # noqa: E402

__all__ = [
    "CarriedStates",
    "TheseanConfig",
    "TheseanForCausalLM",
    "TheseanForSequenceClassification",
    "TheseanModel",
    "from_converted",
    "from_pretrained",
    "save_native",
    "save_pretrained",
    "to_native",
]
