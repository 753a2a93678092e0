#!/usr/bin/env bash
# On a machine with a GPU: everything that only it can prove, in the order in which a failure tells most. The binaries
# come from `cmake --build build/cuda --target all gpu_extras`, here or elsewhere; they need a driver and nothing else.
#
#   benchmarks/run_gpu.sh BUILD OUT [PART ...] [--quick]
#
#   layouts      every instruction and memory layout of the sm_90a kernel, one at a time
#   tests        the GPU tests, each in a process of its own under a time limit: a hang costs one test. If a test of the
#                sm90 kernel hangs, it runs again on kernels that say who waited for what (attention_gpu_spin_test)
#   sanitizer    memcheck, racecheck and synccheck on small shapes
#   bench        our benchmarks (attention, then the whole step); --quick: the shapes of the targets only
#   peers        our kernel, then our step, and dense attention of PyTorch in turns, in one process (needs torch)
#   engine       the engine's tests, the demo on both backends, and time to first token of the Llama-3.1-8B shape; --quick: to
#                32K tokens only. Needs cuBLASLt: the toolkit's, or that of an installed PyTorch
#   experiments  sm90_experiments E1 to E5; --quick: E2 and one second of E5
#
# No part: layouts tests bench peers sanitizer engine experiments. Logs go to OUT; a table of what passed comes last. Exit 1 if
# anything failed. Not run is never passed: a missing binary or tool is a line of the table.
set -uo pipefail

build=$(realpath -m "${1:?build directory}")
out=$(realpath -m "${2:?output directory}")
shift 2
here=$(cd "$(dirname "$0")" && pwd)
gpu=$build/tests/gpu
quick=false
parts=()
for argument in "$@"; do
  case $argument in
    --quick) quick=true ;;
    layouts | tests | sanitizer | bench | peers | engine | experiments) parts+=("$argument") ;;
    *) echo "run_gpu.sh: unknown part '$argument'; allowed: layouts tests sanitizer bench peers engine experiments --quick" >&2; exit 2 ;;
  esac
done
[ ${#parts[@]} -gt 0 ] || parts=(layouts tests bench peers sanitizer engine experiments)
export TEST_SECONDS=${TEST_SECONDS:-40}  # of one test
mkdir -p "$out/tests"
chmod +x "$gpu"/*_test "$build"/compact "$build"/benchmarks/{append_gpu_bench,sm90_experiments} 2>/dev/null  # carried files lose it
: >"$out/table"

row() { echo "$*" | tee -a "$out/table"; }

# name, seconds, command: output to OUT/name.log, one row of the table.
limited() {
  local name=$1 seconds=$2 began=$SECONDS
  shift 2
  if ! command -v "$1" >/dev/null; then
    row "NONE $name: no $1"
    return 1
  fi
  timeout -k 2 "$seconds" "$@" >"$out/$name.log" 2>&1
  local rc=$?
  case $rc in
    0) row "ok   $name ($((SECONDS - began)) s)" ;;
    124 | 137) row "HANG $name (killed after $seconds s)" ;;
    *) row "FAIL $name (exit $rc): $(grep -m1 -iE 'FAIL|error' "$out/$name.log" | cut -c1-150)" ;;
  esac
  return $rc
}

one_test() { # test, log directory
  local log=$2/${1//\//_}.log began=$SECONDS
  timeout -k 1 "$TEST_SECONDS" "$TEST_BINARY" --gtest_filter="$1" >"$log" 2>&1
  local rc=$?
  case $rc in
    0) if grep -q 'SKIPPED' "$log"; then echo "skip $1"; else echo "ok   $1 ($((SECONDS - began)) s)"; fi ;;
    124 | 137) echo "HANG $1 (killed after $TEST_SECONDS s)" ;;
    *) echo "FAIL $1 (exit $rc)" ;;
  esac
}
export -f one_test

layouts() {
  limited layouts 30 "$gpu/ptx_layout_test"
  grep '^FAIL' "$out/layouts.log" 2>/dev/null | cut -c1-180
}

tests() {
  local names binary
  : >"$out/tests/summary"
  for binary in append_gpu_test attention_gpu_test scores_gpu_test select_gpu_test step_gpu_test; do
    export TEST_BINARY=$gpu/$binary
    if ! names=$("$TEST_BINARY" --gtest_list_tests 2>"$out/tests/list.log"); then
      row "NONE tests: $TEST_BINARY does not start (tests/list.log)"
      continue
    fi
    # Four at a time: most of a test is host work.
    sed 's/ *#.*//' <<<"$names" | awk '/^[^ ].*\.$/ {suite=$1; next} /^  / {print suite $1}' |
      xargs -P 4 -I{} bash -c 'one_test "$@"' _ {} "$out/tests" | tee -a "$out/tests/summary"
  done
  grep -E '^(FAIL|HANG)' "$out/tests/summary" | while read -r _ name _; do
    echo "--- $name"
    grep -vE '^\[ |^Note|^Running|^$' "$out/tests/${name//\//_}.log" | head -12
  done
  local hanging
  hanging=$(grep -m1 -E '^HANG .*AttentionGpu.*sm90' "$out/tests/summary" | awk '{print $2}')
  if [ -n "$hanging" ]; then
    echo "--- $hanging on kernels whose waits give up"
    TEST_SECONDS=60 TEST_BINARY=$gpu/attention_gpu_spin_test one_test "$hanging" "$out"
    grep -E '^(warp 0|wait given up)' "$out/${hanging//\//_}.log" | sort -u | head -24
  fi
  row "$(grep -cE '^(FAIL|HANG)' "$out/tests/summary") failed, $(grep -c '^ok' "$out/tests/summary") passed," \
    "$(grep -c '^skip' "$out/tests/summary") skipped: tests"
  grep -E '^(FAIL|HANG)' "$out/tests/summary" >>"$out/table"
}

sanitizer() {
  local tool
  # Small shapes: a kernel runs ten to a hundred times slower here.
  for tool in memcheck racecheck synccheck; do
    limited "sanitizer_$tool" 150 compute-sanitizer --tool "$tool" --error-exitcode 9 "$gpu/attention_gpu_test" \
      --gtest_filter='*OneTile*:*EmptyLists*:*BadPageIds*'
    limited "sanitizer_append_$tool" 150 compute-sanitizer --tool "$tool" --error-exitcode 9 "$gpu/append_gpu_test" \
      --gtest_filter='*ManyChunks*:*OutOfRange*'
    limited "sanitizer_step_$tool" 150 compute-sanitizer --tool "$tool" --error-exitcode 9 "$gpu/step_gpu_test" \
      --gtest_filter='*ShareZero*:*ChunkPages*:*Nonfinite*'
    limited "sanitizer_scores_$tool" 150 compute-sanitizer --tool "$tool" --error-exitcode 9 "$gpu/scores_gpu_test" \
      --gtest_filter='*RowsWithout*'
    limited "sanitizer_select_$tool" 150 compute-sanitizer --tool "$tool" --error-exitcode 9 "$gpu/select_gpu_test" \
      --gtest_filter='Summaries*:*LargeSteps*:*TheStepTakes*'
  done
}

bench() {
  limited bench 200 "$build/compact" bench attention --kernel all $($quick && echo --quick) --json "$out/bench.json"
  cat "$out/bench.log" 2>/dev/null
  limited append 60 "$build/benchmarks/append_gpu_bench" --json "$out/append.json"
  cat "$out/append.log" 2>/dev/null
  # name, requests, query heads, KV heads, and what else: the shapes of the targets, crossover, density.
  local name requests q_heads kv_heads rest
  while read -r name requests q_heads kv_heads rest; do
    limited "$name" 200 "$build/compact" bench step --backend cuda --requests "$requests" --q-heads "$q_heads" \
      --kv-heads "$kv_heads" $rest --json "$out/$name.json"
    cat "$out/$name.log" 2>/dev/null
  done < <(
    echo step_b8 8 16 4 --context 32768,131072
    echo step_b1 1 32 8 --context 65536,131072
    $quick && return
    echo step_short_b8 8 16 4 --context 8192,16384,32768
    echo step_short_b1 1 32 8 --context 8192,16384,32768
    echo step_density 1 32 8 --context 65536 --density 0.05,0.1,0.2,0.3,0.5,0.7,0.85,1
  )
}

peers() {
  limited peers 300 python3 "$here/attention_gpu_compare.py" --library "$build/libcompact.so" $($quick && echo --quick) \
    --json "$out/attention_gpu.json"
  cat "$out/peers.log" 2>/dev/null
  limited step_peers 200 python3 "$here/step_gpu_compare.py" --library "$build/libcompact.so" $($quick && echo --quick) \
    --json "$out/step_gpu_compare.json"
  cat "$out/step_peers.log" 2>/dev/null
}

engine() {
  local libraries contexts=8192,32768,131072,262144
  libraries=$(python3 -c 'import glob, os, sysconfig
found = glob.glob(sysconfig.get_paths()["purelib"] + "/nvidia/**/libcublasLt.so*", recursive=True)
print(":".join(sorted({os.path.dirname(f) for f in found})))' 2>/dev/null)
  export LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
  $quick && contexts=8192,32768
  cd "$here/.." || return
  # The logits of real shapes, if transformers is there to make them.
  for shape in llama31_8b qwen3_8b; do
    limited "golden_$shape" 120 python3 tests/golden/make_model_goldens.py --shape "$here/configs/$shape.json" --out "$out/golden" &&
      COMPACT_GOLDEN_DIR=$out/golden limited "engine_$shape" 60 "$gpu/engine_gpu_test" --gtest_filter='*LargeShape*' &&
      grep 'largest error' "$out/engine_$shape.log"
    rm -rf "$out/golden"
  done
  limited engine_tests 120 "$gpu/engine_gpu_test"
  for backend in cpu cuda; do
    limited "demo_$backend" 120 "$build/compact" demo -m "$here/../assets/demo" --backend $backend --svg ""
    grep -E '^(answer|first token|attention|past pages)' "$out/demo_$backend.log"
  done
  limited prefill 300 "$build/compact" bench prefill --backend cuda --random-weights "$here/configs/llama31_8b.json" \
    --context $contexts --selector dense,mean-key,random:share=0.1 --mode paper --json "$out/prefill_gpu.json"
  limited prefill_moe 200 "$build/compact" bench prefill --backend cuda --random-weights "$here/configs/qwen3_30b_a3b.json" \
    --context $contexts --selector dense,mean-key,random:share=0.1 --mode paper --json "$out/prefill_gpu_moe.json"
  # Chunks of 1024 and 2048 tokens of four requests in a step; contexts that four caches leave room for.
  limited prefill_batch 300 "$build/compact" bench prefill --backend cuda --random-weights "$here/configs/llama31_8b.json" --requests 4 \
    --context ${contexts%,262144} --selector dense,mean-key,random:share=0.1,dense:chunk=2048,mean-key:chunk=2048,random:share=0.1:chunk=2048 \
    --mode paper --json "$out/prefill_gpu_batch.json"
  cat "$out"/prefill*.log 2>/dev/null
}

experiments() {
  local program=$build/benchmarks/sm90_experiments chosen=(E1 E2 E3 E4 E5) seconds=10 experiment clocks=
  $quick && chosen=(E2 E5) seconds=1
  if command -v nvidia-smi >/dev/null; then
    nvidia-smi --query-gpu=timestamp,clocks.sm,power.draw,temperature.gpu --format=csv,noheader -lms 250 >"$out/clocks.csv" &
    clocks=$!
  fi
  for experiment in "${chosen[@]}"; do
    limited "experiment_$experiment" 120 "$program" "$experiment" --seconds "$seconds"
    cat "$out/experiment_$experiment.log" 2>/dev/null
  done
  [ -n "$clocks" ] && kill "$clocks"
}

if command -v nvidia-smi >/dev/null; then
  nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit --format=csv,noheader | tee "$out/machine"
fi
for part in "${parts[@]}"; do
  echo "== $part"
  "$part"
done

printf '\n== table\n'
cat "$out/table"
! grep -qE '^(FAIL|HANG|NONE|[1-9][0-9]* failed)' "$out/table"
