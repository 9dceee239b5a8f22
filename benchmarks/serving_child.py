"""The inner side of a process of bench_serving: each line on its standard input is a request, and is answered.

Nothing but the standard library is imported here: an unmodified vLLM must have nothing of ours beside it.
"""

import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from queue import SimpleQueue

ANSWERS_VARIABLE = "EXPERTMESH_BENCH_ANSWERS"
Request = Mapping[str, object]


def serve(start: Callable[[], tuple[object, Callable[[Request], object]]]) -> None:
    """Answers with what `start` gives, and then each request with what the function that came with it returns.

    Answers are JSON, {"result": ...}, or {"error": ...} where something was raised; the log has the traceback then.
    The process ends when its standard input does, so it never outlives its parent, however that one ends.
    """
    # Libraries print to standard output, so answers have a descriptor of their own; no child of ours may keep it open.
    descriptor = int(os.environ.pop(ANSWERS_VARIABLE))
    os.set_inheritable(descriptor, False)
    out = os.fdopen(descriptor, "w", buffering=1)
    requests: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_read, args=(requests,), daemon=True).start()
    try:
        result, handle = start()
        while True:
            out.write(json.dumps({"result": result}) + "\n")
            result = handle(json.loads(requests.get()))
    except BaseException as error:  # whatever it is, the parent must not wait for more
        traceback.print_exc()
        out.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
        os._exit(1)  # an orderly end would trip over the thread that reads


def _read(requests: SimpleQueue[str]) -> None:
    for line in sys.stdin:
        requests.put(line)
    os._exit(0)  # also in the middle of a computation, which could take minutes
