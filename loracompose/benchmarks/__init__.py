"""Measurements that anybody can run again: each is one module, and one command of `loracompose bench`."""
