"""Model formats: Hugging Face folders, safetensors, GGUF, exports, and the table of tensor names."""
