"""The server: OpenAI's chat API over an engine, requests of different compositions in one batch."""
