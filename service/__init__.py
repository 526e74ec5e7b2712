"""An OpenAI-compatible service of open language models on vLLM.

No imports: the container imports this before anything else. The version is here, where pyproject.toml reads it, since a
container of a deployed app has the package alone, without its metadata.
"""

__version__ = "0.2.0"
