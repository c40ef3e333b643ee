#!/bin/sh
# All tests, in two processes side by side: those that only compute stand back for those that start
# processes and wait for them. What the former say is shown when both have ended.
#
#     tests/run.sh PYTEST...    how pytest is called
set -u
cd "$(dirname "$0")/.."
said=$(mktemp)
quick=
trap 'test -z "$quick" || kill "$quick" 2>/dev/null; rm -f "$said"' EXIT
trap 'exit 130' INT TERM

echo "tests/unit and tests/contract run beside these; what they say comes at the end"
nice -n 10 "$@" tests/unit tests/contract >"$said" 2>&1 &
quick=$!
"$@" tests --ignore=tests/unit --ignore=tests/contract
slow_status=$?
wait "$quick"
quick_status=$?
quick=
echo "tests/unit and tests/contract:"
cat "$said"
[ "$slow_status" -eq 0 ] && [ "$quick_status" -eq 0 ]
