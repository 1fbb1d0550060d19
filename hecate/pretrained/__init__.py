"""Folders of safetensors files as transformers reads and writes them, streamed to and from a model under FSSDP."""
