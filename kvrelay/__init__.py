"""Disaggregated LLM serving: prefill and decode apart, KV handed over token-exactly."""

import os

# gRPC's C core writes connection news to stderr past every logger, unless told otherwise
# before it is first imported. Whoever wants them sets the variable.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
