"""The HTTP server: OpenAI's API over the engine (docs/serve.md). Alone knows the web framework."""
