#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command:
#
#     OUT=results_folder benchmarks/gpu_suite.sh [--trace] [--pack]
#
# Needs python3 with torch, triton, transformers, rich and pytest, nothing installed of this repository; peers (liger-kernel,
# cut-cross-entropy) take part where they are installed. "throughput" is the trainer's own step and needs pydantic, accelerate
# and peft besides: without them it is left out, and says what to install. All steps run whatever fails; the exit status
# tells. --trace adds torch-profiler traces of training steps and, where ncu is on the PATH, Nsight Compute on one operator.
# --pack leaves the eight JSON files and pack.tar.gz with all else.
#
# Estimates on an H200, seconds (limit): resources 40 (90), self-test 20 (60), tests 75 (120), layer KL 150 (200),
# cross-entropy 90 (120), divergence 50 (80), verb-FFN 25 (60), memory 40 (60), throughput 70 (110): some 560. The whole
# suite stops at LIMIT seconds (580): a step gets at most what is left of it, and those that find nothing left are told as
# skipped.
# Where the checkout has no .git, BENCH_COMMIT in the environment names the commit in the results.
set -uo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
OUT=${OUT:-$ROOT/benchmarks/results}
LIMIT=${LIMIT:-580}
PYTHON=${PYTHON:-python3}
TRACE="" PACK=""
for argument in "$@"; do
    case $argument in
        --trace) TRACE=--trace ;;
        --pack) PACK=1 ;;
        *) echo "unknown argument $argument; there are --trace and --pack" >&2; exit 2 ;;
    esac
done

mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
cd "$ROOT" || exit 2
export PYTHONPATH="$ROOT:$ROOT/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export TRITON_INTERPRET=0  # kernels run natively
SUMMARY=()
FAILED=0

# step NAME SECONDS COMMAND..: runs the command for at most SECONDS and notes how it ended
step() {
    local name=$1 seconds=$2 began=$SECONDS left=$((LIMIT - SECONDS)) status=0 state
    shift 2
    if ((left < 5)); then
        SUMMARY+=("SKIPPED  $name: the suite's $LIMIT seconds are spent")
        FAILED=1
        return
    fi
    echo "==== $name"
    timeout --kill-after=10 "$((seconds < left ? seconds : left))" "$@"
    status=$?
    case $status in
        0) state="ok      " ;;
        124 | 137) state="TIMEOUT " FAILED=1 ;;
        *) state="FAILED  " FAILED=1 ;;
    esac
    SUMMARY+=("$state $name: $((SECONDS - began)) s, status $status")
}

B=benchmarks
# first: the tests compile the same kernels and find them in Triton's cache
step "resources" 90 "$PYTHON" $B/resources.py --json "$OUT/resources.json"
step "self-test" 60 "$PYTHON" $B/self_test.py --json "$OUT/self_test.json"
# side by side, since most of their time is the compiler's; 5: a file of which all tests are skipped
# shellcheck disable=SC2016
ONE='"$0" -m pytest "$1" -q --maxfail=20 -p no:cacheprovider; status=$?; exit $((status == 5 ? 0 : status))'
# shellcheck disable=SC2016
step "kernel tests" 120 bash -c 'printf "%s\0" tests/test_kernels_*.py | xargs -0 -P 6 -n 1 bash -c "$1" "$0"' "$PYTHON" "$ONE"
step "layer KL" 200 "$PYTHON" $B/bench_layer_kl.py --out "$OUT"
step "cross-entropy" 120 "$PYTHON" $B/bench_verbalize_ce.py --out "$OUT"
step "divergence" 80 "$PYTHON" $B/bench_divergence.py --out "$OUT"
step "verb-FFN" 60 "$PYTHON" $B/bench_verb_ffn.py --out "$OUT"
step "memory" 60 "$PYTHON" $B/profile_memory.py --out "$OUT"
step "throughput" 110 "$PYTHON" $B/profile_throughput.py --out "$OUT" $TRACE
if [[ -n $TRACE ]] && command -v ncu > /dev/null; then
    # the clocks are left alone: they are the machine's owner's
    step "Nsight Compute" 90 ncu --clock-control none --set basic --kernel-name regex:softmax_tile --launch-skip 4 \
        --launch-count 4 --force-overwrite --export "$OUT/layer_kl" \
        "$PYTHON" $B/bench_layer_kl.py --shapes 7b-to-2b:512 --rounds 1 --no-compile --out "$(mktemp -d)"
fi

if [[ -n $PACK ]]; then
    (cd "$OUT" && find . -type f ! -name '*.json' ! -name pack.tar.gz -print0 |
        tar --create --gzip --file pack.tar.gz --null --files-from - --remove-files) || FAILED=1
fi

echo "==== summary, $SECONDS s; results in $OUT"
printf '%s\n' "${SUMMARY[@]}"
exit $FAILED
