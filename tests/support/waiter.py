"""A worker that waits as many seconds as its job's ``data`` says, and is done; all else is as in the real one."""

import sys
import time

from emloc_core.zoo.engines import worker
from emloc_core.zoo.jobs.outcome import Outcome


def wait(job, _):
    print(f"waiting {job.data} s", flush=True)
    time.sleep(float(job.data))
    return Outcome(None)


if __name__ == "__main__":
    worker.run = wait
    sys.exit(worker.main(sys.argv[1]))
