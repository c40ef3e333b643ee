"""llama.cpp's own OpenAI-style server, as a process. Run by the Python of its environment.

`llama_server.py MODEL.gguf PORT NUM_SLOTS CONTEXT_TOKENS NUM_THREADS`; the context is that of each
slot. Imports nothing of kvrelay, which is not installed there.
"""

import sys
import threading

import xllamacpp  # type: ignore[import-not-found]


def main() -> None:
    """Serve until a signal."""
    path, port, num_slots, context_tokens, num_threads = sys.argv[1], *map(int, sys.argv[2:])
    parameters = xllamacpp.CommonParams()
    parameters.model.path = path
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = port
    parameters.n_parallel = num_slots
    parameters.n_ctx = num_slots * context_tokens
    parameters.cpuparams.n_threads = num_threads
    parameters.cpuparams_batch.n_threads = num_threads
    server = xllamacpp.Server(parameters)  # serves from threads of its own while it is referenced
    threading.Event().wait()
    del server


if __name__ == "__main__":
    main()
