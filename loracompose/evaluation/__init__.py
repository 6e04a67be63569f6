"""Does composing help, when, and which method? Tasks, protocols, methods, scores, and what they show."""
