"""Search in pools too large for memory: vectors frozen in versions for faiss, few candidates rescored exactly."""
