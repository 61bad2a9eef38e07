"""Progress bars of the libraries are noise in a log file."""

import transformers


def quieten() -> None:
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
