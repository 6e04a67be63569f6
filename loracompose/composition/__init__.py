"""Ranks side by side and what is done to them: banks, deltas, gates, factored linear algebra."""
