"""Progress on the screen: tqdm's bar below the lines on a terminal, lines alone elsewhere."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm


class Screen:
    """Lines of text on stdout, and below them, on a terminal, a bar.

    Args:
        total: where the bar ends.
        what: is counted, in front of the bar.
        leave: the finished bar stays on the terminal.
        quiet: no bar.
    """

    def __init__(self, total: int, what: str = "", *, leave: bool = False, quiet: bool = False):
        self.terminal = sys.stdout.isatty() and not quiet
        self._bar = tqdm(
            total=total, desc=what, leave=leave, file=sys.stdout, disable=not self.terminal, dynamic_ncols=True
        )

    def move(self, done: int, text: str = "") -> None:
        """Set the bar to `done` of the total, with `text` behind it; nothing where there is no terminal."""
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(done - self._bar.n)

    def line(self, text: str) -> None:
        """Print a line, above the bar."""
        self._bar.write(text, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        self._bar.close()


class Bar:
    """Progress of counted work: a bar on a terminal, a line every tenth elsewhere.

    Called with how much is done and the total; work that ends before the total leaves the bar where it was.
    """

    def __init__(self, what: str):
        self.what, self.began, self.tenth = what, time.perf_counter(), -1
        self._screen: Screen | None = None

    def __call__(self, done: int, total: int) -> None:
        screen = self._screen = self._screen or Screen(total, self.what, leave=True)
        screen.move(done)
        tenth = 10 * done // total
        if not screen.terminal and tenth > self.tenth:
            self.tenth = tenth
            seconds = max(time.perf_counter() - self.began, 1e-9)
            screen.line(f"  {self.what} {done}/{total}  {done / seconds:.1f}/s")
        if done >= total:
            screen.close()
