"""Makes all-MiniLM-L6-v2, as published, into ONNX: python3 make_model.py SOURCE TARGET

SOURCE holds model.safetensors, config.json and tokenizer.json. TARGET gets tokenizer.json, model.onnx, the graph, and
model.onnx.data, the weights in fp32. Each starts a page there, so that onnxruntime maps it into memory: all backends
share one copy of what it does not rearrange for its matrix products.

The graph is BERT's encoder (Devlin et al., 2018): embeddings, then layers of self-attention and feed-forward, each with
a residual and a layer norm. It is written in onnxruntime's fused operators straight away. A plain export leaves it to
each session to find and fuse them, which takes time and, for weights that it must join, private memory.

The operators are defined in https://github.com/onnx/onnx/blob/main/docs/Operators.md and, those of the domain
com.microsoft, in https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from onnx import ModelProto, NodeProto, TensorProto, checker, helper, numpy_helper, save_model
from onnx.external_data_helper import set_external_data

SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
PAGE_BYTES = 4096
OPSETS = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]

Array = np.ndarray[Any, np.dtype[Any]]


class Encoder:
    """The graph under construction; its methods return the name of the value that they add."""

    def __init__(self, weights: dict[str, Array], config: dict[str, Any]) -> None:
        self._weights = weights
        self._config = config
        self._epsilon = float(config["layer_norm_eps"])
        self._nodes: list[NodeProto] = []
        self._constants: list[TensorProto] = []
        self._data_bytes = 0

    def model(self) -> ModelProto:
        hidden = self._embeddings()
        for layer in range(self._config["num_hidden_layers"]):
            hidden = self._layer(f"encoder.layer.{layer}.", hidden)
        self._node("Identity", [hidden], "last_hidden_state")
        value, shape = helper.make_tensor_value_info, ["texts", "tokens"]
        inputs = [value(name, TensorProto.INT64, shape) for name in ("input_ids", "attention_mask")]
        output = value("last_hidden_state", TensorProto.FLOAT, [*shape, self._config["hidden_size"]])
        graph = helper.make_graph(self._nodes, "all-MiniLM-L6-v2", inputs, [output], self._constants)
        return helper.make_model(graph, ir_version=8, opset_imports=OPSETS)

    def _embeddings(self) -> str:
        # A single text is all of type 0.
        position = self._weights["embeddings.position_embeddings.weight"]
        position = position + self._weights["embeddings.token_type_embeddings.weight"][0]
        self._node("Cast", ["attention_mask"], "mask", to=TensorProto.INT32)
        self._node("Shape", ["input_ids"], "length", start=1, end=2)
        zero = self._constant("zero", np.array([0]))
        self._node("Slice", [self._constant("embeddings.position", position), zero, "length", zero], "positions")
        self._node("Gather", [self._weight("embeddings.word_embeddings.weight"), "input_ids"], "words")
        self._node("Add", ["words", "positions"], "sum")
        norm = self._parameters("embeddings.LayerNorm")
        return self._node("LayerNormalization", ["sum", *norm], "embeddings", epsilon=self._epsilon)

    def _layer(self, name: str, hidden: str) -> str:
        projections = [f"{name}attention.self.{part}" for part in ("query", "key", "value")]
        weight = np.concatenate([self._weights[f"{part}.weight"].T for part in projections], axis=1)
        bias = np.concatenate([self._weights[f"{part}.bias"] for part in projections])
        joined = [self._constant(f"{name}qkv.weight", weight), self._constant(f"{name}qkv.bias", bias)]
        heads = self._config["num_attention_heads"]
        attention = self._fused("Attention", [hidden, *joined, "mask"], f"{name}attention", num_heads=heads)
        hidden = self._add_and_norm(f"{name}attention.output", attention, hidden)
        wide = f"{name}intermediate.dense"
        activated = self._fused("BiasGelu", [self._product(wide, hidden), self._weight(f"{wide}.bias")], f"{name}gelu")
        return self._add_and_norm(f"{name}output", activated, hidden)

    def _add_and_norm(self, name: str, value: str, residual: str) -> str:
        product = self._product(f"{name}.dense", value)
        inputs = [product, residual, *self._parameters(f"{name}.LayerNorm"), self._weight(f"{name}.dense.bias")]
        return self._fused("SkipLayerNormalization", inputs, name, epsilon=self._epsilon)

    def _product(self, name: str, value: str) -> str:
        weight = self._constant(f"{name}.weight", self._weights[f"{name}.weight"].T)
        return self._node("MatMul", [value, weight], name)

    def _parameters(self, name: str) -> list[str]:
        return [self._weight(f"{name}.weight"), self._weight(f"{name}.bias")]

    def _weight(self, name: str) -> str:
        return self._constant(name, self._weights[name])

    def _constant(self, name: str, value: Array) -> str:
        tensor = numpy_helper.from_array(value, name)
        if value.nbytes >= PAGE_BYTES:
            set_external_data(tensor, "model.onnx.data", offset=self._data_bytes)
            self._data_bytes += -(-value.nbytes // PAGE_BYTES) * PAGE_BYTES
        self._constants.append(tensor)
        return name

    def _node(self, operator: str, inputs: list[str], output: str, domain: str = "", **attributes: Any) -> str:
        self._nodes.append(helper.make_node(operator, inputs, [output], domain=domain, **attributes))
        return output

    def _fused(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        return self._node(operator, inputs, output, "com.microsoft", **attributes)


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    weights = (source / "model.safetensors").read_bytes()
    sha256 = hashlib.sha256(weights).hexdigest()
    if sha256 != SHA256:
        raise SystemExit(f"{source}/model.safetensors has sha256 {sha256}, the published one has {SHA256}.")
    config = json.loads((source / "config.json").read_text())
    target.mkdir(parents=True, exist_ok=True)
    save_model(Encoder(safetensors.numpy.load(weights), config).model(), target / "model.onnx")
    checker.check_model(target / "model.onnx", full_check=True)
    # onnx leaves it to its owner alone; the server runs as another.
    (target / "model.onnx.data").chmod(0o644)
    shutil.copyfile(source / "tokenizer.json", target / "tokenizer.json")


if __name__ == "__main__":
    main()
