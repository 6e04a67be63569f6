"""Keep the libraries underneath from drawing their own progress bars over ours."""

from __future__ import annotations


def quiet_loading() -> None:
    """Switch off the weight-loading bars of transformers, in this process."""
    from transformers.utils import logging

    logging.disable_progress_bar()
