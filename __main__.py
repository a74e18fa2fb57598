"""`python -m tsdsr`, for places where the `tsdsr` script is not on the path."""

from .cli import main

main()
