"""Progress bars of the libraries are noise in a log file."""

import logging

import transformers


def quieten() -> None:
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # one line for every product of 8 bits
