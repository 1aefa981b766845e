"""A stand-in for embedding APIs: real HTTP on loopback, vectors that follow from the text, faults on order.

    python3 fake_api --host 127.0.0.1 --port 8000

POST /{tenant}/v1/embeddings   OpenAI's protocol; each tenant has its own behaviour and its own log
POST /{tenant}/...             the protocols of Azure, Cohere, Voyage (under /voyage/v1), Gemini and Ollama; those
                               that rerank: Cohere, Voyage, Jina (/v1/rerank), TEI (/tei/rerank)
PUT /control/{tenant}          set the tenant's behaviour (PATCH: amend it; DELETE: forget the tenant)
GET /control/{tenant}          its behaviour, counters and log (?only=counters leaves the log out)
POST /control/{tenant}/wait    its counters, as soon as they are `least` and `most`, or after `seconds`
PUT /ports/{port}              open a further port (DELETE: close it, so that connections are refused)
GET /health                    answers as soon as the server does

Written from the providers' API references, which the modules of the providers name, and from error bodies that
their users have published. A token is four characters, rounded up per text. Standard library and numpy only.
"""

from __future__ import annotations

from fake_api.client import FakeApi
from fake_api.server import Server
from fake_api.vectors import Vector, embedding_of, relevance_of, tokens_in

__all__ = ["FakeApi", "Server", "Vector", "embedding_of", "relevance_of", "tokens_in"]
