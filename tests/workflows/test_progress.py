import io

from fdl_bidsapp.workflows.progress import Progress


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_line_counts_failures_and_extrapolates_the_time_left() -> None:
    clock = Clock()
    progress = Progress(300, stream=io.StringIO(), clock=clock)
    assert progress.line() == "0/300 scans, 0 failed"
    clock.now = 60
    for number in range(12):
        progress.scan_done(failed=number < 2)
    assert progress.line() == "12/300 scans, 2 failed, about 24 min left"


def test_long_and_short_times_are_in_their_units() -> None:
    clock = Clock()
    progress = Progress(100, stream=io.StringIO(), clock=clock)
    clock.now = 360
    progress.scan_done()
    assert progress.line().endswith("about 9.9 h left")
    for _ in range(98):
        progress.scan_done()
    assert progress.line().endswith("less than a minute left")


def test_terminal_line_is_rewritten_in_place() -> None:
    stream = Terminal()
    with Progress(2, stream=stream) as progress:
        progress.scan_done()
        progress.scan_done()
    text = stream.getvalue()
    assert text.count("\r") == 3
    assert text.count("\n") == 1
    assert text.endswith("\n")


def test_log_gets_a_line_now_and_then_and_the_last() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(100, stream=stream, clock=clock, interval=30) as progress:
        for _ in range(100):
            clock.now += 1
            progress.scan_done()
    lines = stream.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["1/100", "31/100", "61/100", "91/100", "100/100"]
    assert lines[-1] == "100/100 scans, 0 failed, in about 2 min"
