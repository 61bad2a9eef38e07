"""How a run ends when it does not end well: every error that a person can mend carries the remedy."""


class InputError(ValueError):
    """Bad input or options: the run ends with exit status 2 and an `error.json` that names the place and the remedy."""

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.remedy = remedy


class TrainingFailed(RuntimeError):
    """Training cannot go on (for example, no finite step any more); the remedy says what to change."""

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.remedy = remedy


class Stopped(Exception):
    """Asked to stop (SIGTERM) and stopped in good order: the state is in the newest checkpoint. Exit status 75."""
