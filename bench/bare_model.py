"""The local model without us: a plain loop of tokenizers and onnxruntime. Texts as JSON on stdin; prints the seconds.

Runs inside the server's container, as `python3 bare_model.py FOLDER`.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

BATCH_SIZE = 32
MAX_TOKENS = 256


def main() -> None:
    folder = sys.argv[1]
    texts: list[str] = json.load(sys.stdin)
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    tokenizer.enable_padding()
    tokenizer.enable_truncation(MAX_TOKENS)
    session = onnxruntime.InferenceSession(f"{folder}/model.onnx", providers=["CPUExecutionProvider"])
    names = [model_input.name for model_input in session.get_inputs()]
    began = time.perf_counter()
    for start in range(0, len(texts), BATCH_SIZE):
        encodings = tokenizer.encode_batch(texts[start : start + BATCH_SIZE])
        ids = np.array([encoding.ids for encoding in encodings], np.int64)
        mask = np.array([encoding.attention_mask for encoding in encodings], np.int64)
        values = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        (hidden,) = session.run(None, {name: values[name] for name in names})
        vectors = (hidden * mask[:, :, None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    print(time.perf_counter() - began)


main()
