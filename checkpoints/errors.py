"""The one error of this room."""


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message is one sentence: which file, what was found, what was expected, how to
    mend it.
    """
