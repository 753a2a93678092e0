#!/usr/bin/env bash
# On a machine with a GPU: tests, our benchmark and the peers, then one table. Binaries come from a build elsewhere.
#   benchmarks/run_gpu.sh BUILD OUT [tests|bench|all] [--quick]
# Every test is a process of its own under a timeout, so that a hang costs one test. Exit 1 if a test failed.
set -uo pipefail
build=${1:?build directory}
out=${2:?output directory}
what=${3:-all}
quick=${4:-}
here=$(cd "$(dirname "$0")" && pwd)
test=$build/tests/gpu/attention_gpu_test
bench=$build/benchmarks/attention_gpu_bench
test_seconds=25
mkdir -p "$out/tests"
chmod +x "$test" "$bench" 2>/dev/null

one_test() { # binary, name, seconds, log directory
  local log=$4/${2//\//_}.log began=$SECONDS
  timeout -s KILL "$3" "$1" --gtest_filter="$2" >"$log" 2>&1
  local rc=$?
  case $rc in
    0) grep -q 'SKIPPED' "$log" && echo "skip $2" || echo "ok   $2 ($((SECONDS - began)) s)" ;;
    137) echo "HANG $2 (killed after $3 s)" ;;
    *) echo "FAIL $2 (exit $rc)" ;;
  esac
}
export -f one_test

failed=0
if [ "$what" != bench ]; then
  "$test" --gtest_list_tests 2>/dev/null | sed 's/ *#.*//' |
    awk '/^[^ ].*\.$/ {suite=$1; next} /^  / {print suite $1}' >"$out/tests/names"
  # Four at a time: most of a test is host work.
  xargs -P 4 -I{} bash -c 'one_test "$@"' _ "$test" {} "$test_seconds" "$out/tests" <"$out/tests/names" | tee "$out/tests/summary"
  failed=$(grep -cE '^(FAIL|HANG)' "$out/tests/summary")
  grep -E '^FAIL' "$out/tests/summary" | awk '{print $2}' | while read -r name; do
    echo "--- $name"
    grep -vE '^\[ |^Note|^Running|^$' "$out/tests/${name//\//_}.log" | head -12
  done
fi
if [ "$what" != tests ]; then
  timeout -s KILL 150 "$bench" $quick --json "$out/bench.json" | tee "$out/bench.log"
  timeout -s KILL 150 python3 "$here/attention_gpu_peers.py" $quick --ours "$out/bench.json" --json "$out/peers.json" | tee "$out/peers.log"
fi
if [ "$what" != bench ]; then
  echo "tests: $(grep -c '^ok' "$out/tests/summary") passed, $failed failed, $(grep -c '^skip' "$out/tests/summary") skipped"
  grep -E '^(FAIL|HANG)' "$out/tests/summary"
fi
[ "$failed" -eq 0 ]
