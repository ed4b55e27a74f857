#!/usr/bin/env bash
# Builds, tests, checks and measures everything that needs a GPU, in ten minutes and without network: the GPU tests,
# compute-sanitizer for invalid accesses and races, and the benchmarks, printed as one table at the end. OUT receives the
# table (table.txt), the measurements (.json) and the output of every part (record.log). The exit status is 0 if all
# parts passed.
#
#     bench/gpu_record.sh OUT            on a machine with a GPU, torch, triton, pytest, pytest-benchmark (and nvcc)
#     bench/gpu_record.sh --smoke OUT    the same steps on tiny problems, without a GPU or a build, to test this script
set -u
smoke=
if [ "${1:-}" = --smoke ]; then
    smoke=1
    shift
fi
if [ $# -ne 1 ] || [[ $1 = -* ]]; then
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
root=$(cd "$(dirname "$0")/.." && pwd) || exit 2
python=${PYTHON:-python3}
gpu='import sys, torch; sys.exit(not torch.cuda.is_available())'
if [ -z "$smoke" ] && ! (cd "$root" && "$python" -c "$gpu"); then
    echo "torch.cuda sees no GPU: nothing to record (bench/gpu_record.sh --smoke OUT tests the script)" >&2
    exit 2
fi
mkdir -p "$1" && out=$(cd "$1" && pwd) && mkdir -p "$out/logs" && cd "$root" || exit 2
results=$PWD/bench/results
if [ -n "$smoke" ]; then
    results=$out/.results
    export TRITON_INTERPRET=1 OMP_NUM_THREADS=1
fi
export PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=$out/.triton
whole=580 benches=() ops=()
for file in bench/bench_*.py; do
    name=$(basename "${file#bench/bench_}" .py)
    benches+=("$name")
    [ -d "inr_kernels/$name" ] && ops+=("$name")
done

# part NAME SECONDS COMMAND...: runs a command for at most so long, within the time of the whole; prints its status.
part() {
    local name=$1 limit=$2 began=$SECONDS left=$((whole - SECONDS)) status
    shift 2
    [ "$left" -lt "$limit" ] && limit=$left
    [ -n "$smoke" ] && limit=600 # only the steps are tested, not their time
    if [ "$limit" -lt 1 ]; then
        status=124
        echo "no time was left" >"$out/logs/$name.log"
    else
        timeout -k 5 "$limit" "$@" >"$out/logs/$name.log" 2>&1
        status=$?
    fi
    case $status in
        0) echo "ok      $name, $((SECONDS - began)) s" ;;
        124 | 137) echo "STOPPED $name after $((SECONDS - began)) s: out of time" ;;
        *) printf '%s\n' "FAILED  $name ($status), $((SECONDS - began)) s" "$(tail -n 3 "$out/logs/$name.log")" ;;
    esac
    [ "$status" = 0 ] || echo "$name" >>"$out/.failed"
    return "$status"
}
rm -rf "$out"/logs/* "$out"/*.json "$out/.failed" "$out/.triton"
touch "$out/.began"
# Warnings are not errors here: they depend on the machine's other packages.
pytest=("$python" -m pytest -q -p no:cacheprovider -W default)

if [ -z "$smoke" ]; then
    nvidia-smi >"$out/logs/machine.log" 2>&1
    arch=$("$python" -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}{b}")')
    export CUDAARCHS=${CUDAARCHS:-$arch-real} # code for this GPU only
    part build 130 "$python" -m pip install --no-index --no-build-isolation --no-deps -e .
fi

# First, with an empty cache of compiled kernels: the time to the first result, each op in a process of its own.
for op in "${ops[@]}"; do
    small=()
    [ -n "$smoke" ] && small=(--small)
    if [ -z "$smoke" ] || [ "$op" = elementwise_filter ]; then
        part "first-$op" 30 "$python" -m bench.one_call "$op" "${small[@]}" && tail -n 2 "$out/logs/first-$op.log"
    fi
done

# In parallel processes: they compile most of the time, and an invalid access ends only its own process.
if [ -n "$smoke" ]; then
    part tests 60 "${pytest[@]}" tests/ops/test_on_gpu.py -m gpu --collect-only &
else
    for op in "${ops[@]}"; do
        for dtype in float32 bfloat16 "float16 and not bfloat16"; do
            part "tests-$op-${dtype%% *}" 120 "${pytest[@]}" tests/ops/test_on_gpu.py -m gpu -k "$op and $dtype" &
        done
    done
    part tests-models 120 "${pytest[@]}" tests/ops/test_on_gpu.py -m gpu -k "graphed or large" &
    mapfile -t others < <(grep -lE '^(@|pytestmark = )pytest\.mark\.gpu' tests/*/test_*.py | grep -v test_on_gpu)
    part tests-others 120 "${pytest[@]}" "${others[@]}" -m gpu &
fi
wait

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -n 1)
if [ -n "$smoke" ]; then
    part check-elementwise_filter 60 "$python" -m bench.one_call elementwise_filter --small --backend triton
elif [ -z "$sanitizer" ]; then
    echo "MISSING compute-sanitizer: invalid accesses and races were not checked"
    echo compute-sanitizer >>"$out/.failed"
else
    for op in "${ops[@]}"; do
        for tool in memcheck racecheck; do # one allocation per tensor, so that memcheck sees its bounds
            part "$tool-$op" 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
                "$sanitizer" --tool "$tool" --error-exitcode 9 "$python" -m bench.one_call "$op" --small &
        done
    done
    wait
fi

if [ -n "$smoke" ]; then
    part bench 60 "${pytest[@]}" bench/bench_fourier_unit.py --benchmark-only --tiny --results "$results" -k bench_unit
else
    for bench in "${benches[@]}"; do
        part "bench-$bench" 60 "${pytest[@]}" "bench/bench_$bench.py" --benchmark-only -k "not compile"
    done
    for file in $(grep -l '"compile"' bench/bench_*.py); do # torch.compile takes the longest
        part "compile-$(basename "$file" .py)" 60 "${pytest[@]}" "$file" --benchmark-only -k compile --add
    done
fi

echo
table=$(find "$results" -name '*.json' -newer "$out/.began" 2>/dev/null | head -n 1)
if [ -n "$table" ]; then
    cp "$table" "$out/"
    "$python" -m bench.report "$table" | tee "$out/table.txt"
fi
(cd "$out/logs" && tail -n +1 -- *.log) >"$out/record.log"
failed=$(sort "$out/.failed" 2>/dev/null | tr '\n' ' ')
rm -rf "$out/.triton" "$out/.results" "$out/.began" "$out/.failed" "$out/logs"
if [ -n "$failed" ]; then
    echo "failed parts: $failed"
    exit 1
fi
