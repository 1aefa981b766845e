"""The protocols of the providers, one file each; nothing of one provider is known outside it.

Those that rerank are alike, and in one file.
"""

from __future__ import annotations

from fake_api.protocols import azure, cohere, gemini, ollama, openai, rerank, voyage

PROTOCOLS = [*(module.PROTOCOL for module in (openai, azure, cohere, voyage, gemini, ollama)), *rerank.PROTOCOLS]
