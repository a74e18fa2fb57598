"""The one error for weights that cannot be used."""


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message is one sentence: which file, what was found, what was expected, how to
    mend it.
    """
