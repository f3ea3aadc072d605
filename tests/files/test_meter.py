"""Peak memory is the process's own, not its parent's."""

import subprocess
import sys

from emloc_core.files.meter import Meter, peak_rss_bytes

CHILD = "from emloc_core.files.meter import peak_rss_bytes; print(peak_rss_bytes())"


def test_a_small_child_of_a_large_process_is_small():
    ballast = bytearray(400 << 20)
    ballast[:: 1 << 12] = b"x" * len(ballast[:: 1 << 12])  # touch every page
    assert peak_rss_bytes() > len(ballast)
    child = int(subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True).stdout)
    assert child < len(ballast) // 4


def test_the_reading_has_seconds_and_bytes():
    reading = Meter().read()
    assert reading["seconds"] >= 0
    assert reading["peak_rss_bytes"] > 1 << 20
