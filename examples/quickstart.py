"""A small GPT-2 becomes a recurrent network that runs in onnxruntime: `python examples/quickstart.py`."""

import numpy as np
import onnxruntime
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import thesean

config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0, use_cache=False)
guide = GPT2LMHeadModel(config).eval()  # yours is trained, its batches are real, and recipe="default" fine-tunes
converted = thesean.compile(guide, target="rnn", data=list(torch.randint(64, (8, 4, 32))), recipe="fast")
print(converted.plan, converted.report, sep="\n")
converted.export("quickstart.onnx")

session = onnxruntime.InferenceSession("quickstart.onnx")  # input_ids and states in, logits and states out
kinds = {"tensor(int64)": np.int64, "tensor(float)": np.float32}
feeds = {  # free sizes are batch and time: one token 0, and the zeros that start every state
    i.name: np.zeros([n if isinstance(n, int) else 1 for n in i.shape], kinds[i.type]) for i in session.get_inputs()
}
for _ in range(20):
    logits, *states = session.run(None, feeds)
    feeds = dict(zip(feeds, [logits.argmax(-1), *states], strict=True))
    print(feeds["input_ids"].item(), end=" ", flush=True)
