"""An OpenAI-compatible service of open language models on vLLM.

Kept empty on purpose: the container imports this before anything else.
"""
