"""Loading and saving models under FSSDP in transformers' folder format (safetensors), one expert at a time."""
