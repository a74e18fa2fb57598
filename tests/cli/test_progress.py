"""The bars on a terminal; elsewhere lines are all there is."""

import io

import pytest

from tsdsr.cli.progress import Display


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(display):
    with display:
        display.begin("a.png")
        display.tiles(3, 8)
        display._progress.refresh()
        display.end("a.png -> b.png")
        display.begin("[bold]c.png")
        display.end("skipped c.png", failed=True)


@pytest.fixture
def streams(monkeypatch):
    """Function that replaces stdout and stderr by new ones of a class."""

    def replace(kind):
        out, err = kind(), kind()
        monkeypatch.setattr("sys.stdout", out)
        monkeypatch.setattr("sys.stderr", err)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "100")
        return out, err

    return replace


def test_lines_only_where_there_is_no_terminal(streams):
    out, err = streams(io.StringIO)
    run(Display(2))
    assert out.getvalue() == "[1/2] a.png -> b.png\n"
    assert err.getvalue() == "[2/2] skipped c.png\n"


def test_no_count_for_a_single_picture(streams):
    out, _ = streams(io.StringIO)
    with Display(1) as display:
        display.end("a.png -> b.png")
    assert out.getvalue() == "a.png -> b.png\n"


def test_bars_on_a_terminal(streams):
    out, err = streams(Terminal)
    run(Display(2))
    text = out.getvalue() + err.getvalue()
    assert "3/8" in text and "pictures" in text
    assert "[1/2] a.png -> b.png" in text and "[2/2] skipped c.png" in text
    assert "[bold]c.png" in text  # a file's name is not markup
    assert text.endswith("\x1b[2K") or "\x1b[?25h" in text  # the bars are gone and the cursor is back


def test_frames_are_counted_and_their_tiles_begin_anew(streams):
    _, err = streams(Terminal)
    with Display(1) as display:
        display.begin("a.gif")
        display.tiles(8, 8)
        for frames in (12, 0):
            display.frame(3, frames)
            display.tiles(1, 8)
            display._progress.refresh()
        display.frame(1, 1)  # no word of the only one
    assert "a.gif, frame 3/12" in err.getvalue() and "a.gif, frame 3 " in err.getvalue()
    assert "1/8" in err.getvalue() and "frame 1" not in err.getvalue()


def test_lines_of_several_processes_are_told_apart_and_have_no_bars(streams):
    out, err = streams(Terminal)
    with Display(3, process=1) as display:
        display.begin("a.png")
        display._progress.refresh()
        display.keep()
        display.end("b.png -> c.png")
    assert (out.getvalue(), err.getvalue()) == ("1: [2/3] b.png -> c.png\n", "")
