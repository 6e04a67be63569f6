"""From prompts to adapters: embed, search, weigh. The catalog imports without torch."""
