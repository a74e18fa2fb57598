"""`tsdsr compress`: a one-step model in, a smaller one out."""

import typer

# Its options are the settings of training/compress/config.py, which parses them.
SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}


def compress(context: typer.Context) -> None:
    """Prune and compress a one-step model as TinySR does: blocks, prompt, modulation and VAE."""
    from ..training.compress.__main__ import main

    main(context.args)
