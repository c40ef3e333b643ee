#!/bin/sh
# Writes the stubs of protos/kvrelay/v1 into the tree rooted at $1 (default: the checkout).
# grpcio-tools is pinned: newer releases emit code that older protobuf runtimes refuse.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
out=${1:-$root}
python=${PYTHON:-$root/.venv/bin/python}
mkdir -p "$out/kvrelay/v1"
PATH=$(dirname "$python"):$PATH "$python" -m grpc_tools.protoc \
  -I "$root/protos" \
  --python_out="$out" --grpc_python_out="$out" --mypy_out="$out" --mypy_grpc_out="$out" \
  "$root"/protos/kvrelay/v1/*.proto
[ -f "$out/kvrelay/v1/__init__.py" ] || printf '"""Generated stubs of protos/kvrelay/v1; see protos/generate.sh."""\n' > "$out/kvrelay/v1/__init__.py"
