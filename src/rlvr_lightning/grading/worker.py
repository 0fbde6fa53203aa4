"""Grade one (grader, ground truth, extracted answer) per line, in a process that its parent may kill at any moment.

Started as ``python -m rlvr_lightning.grading.worker MEMORY_BYTES ORPHAN_LIMIT_S``. The first line out says ``ready``; then
every JSON line in gives one JSON line out: ``[grader]`` loads a grader, ``[grader, answer, extracted]`` gives a verdict.
"""

import json
import logging
import os
import resource
import signal
import sys
import warnings

from rlvr_lightning.grading import Grader, load_grader


def main() -> None:
    """Serve until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent decides
    memory, orphan_limit_s = int(sys.argv[1]), float(sys.argv[2])
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (memory if hard == resource.RLIM_INFINITY else min(memory, hard), hard))
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not be read as a verdict
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    graders: dict[str, Grader] = {}

    def reply(reason: str) -> None:
        print(json.dumps(reason), file=replies, flush=True)

    reply("ready")
    for line in sys.stdin:
        name, *pair = json.loads(line)
        if not pair:  # imports, and builds tables, before the first clock starts
            graders[name] = load_grader(name)
            graders[name].compare("12.8 + x", r"x + \frac{64}{5}")
            reply("ready")
            continue
        # The kernel ends this process even inside one long multiplication, should the parent have died on its watch.
        signal.setitimer(signal.ITIMER_REAL, orphan_limit_s)
        try:
            reason = graders[name].compare(*pair)
        except Exception:  # RecursionError and MemoryError are among them
            reason = "error"
        signal.setitimer(signal.ITIMER_REAL, 0)
        reply(reason)


if __name__ == "__main__":
    main()
