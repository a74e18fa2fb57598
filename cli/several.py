"""Options that take several values: `--metrics psnr ssim` as well as `--metrics psnr --metrics ssim`."""

from typing import Any

from typer.core import TyperCommand


class SeveralValues(TyperCommand):
    """A command whose repeatable options each take all words up to the next option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        names = {name for parameter in self.params if getattr(parameter, "multiple", False) for name in parameter.opts}
        found: list[str] = []
        open_option: str | None = None
        for word in args:
            if word.startswith("-") and word != "-":
                open_option = word if word in names else None
                found.append(word)
            elif open_option and found[-1] != open_option:
                found += [open_option, word]
            else:
                found.append(word)
        return super().parse_args(ctx, found)
