#!/usr/bin/env bash
# Builds, proves, tests and measures everything that needs a GPU, without network and without installing anything.
#
#     bench/gpu_record.sh [--only PART,...] [--limit SECONDS] OUT     on a machine with a GPU
#     bench/gpu_record.sh --smoke OUT     the same steps on tiny problems, without a GPU or a build, to test this script
#
# Parts, in this order: build, prove (as `inr-kernels prove`, whose verdicts stay on this machine), tests (with
# compute-sanitizer), bench. Each step has a time limit; --limit is one of the whole call. What is missing on the machine
# is named first, all at once. Steps that passed are not run again on the same OUT and commit, so that several short calls
# do the work of a long one, also on machines that start bare. OUT receives verdicts.json, the measurements (.json),
# table.txt and the steps' output (logs/). The exit status is 0 if all steps passed; races that racecheck reports do not
# count, as it may not understand bulk copies and clusters.
set -u
usage() {
    sed -n '2,14s/^# \{0,1\}//p' "$0" >&2
    exit 2
}
smoke='' only=build,prove,tests,bench whole=''
while [ $# -gt 1 ]; do
    case $1 in
        --smoke) smoke=1 && shift ;;
        --only) only=$2 && shift 2 ;;
        --limit) whole=$2 && shift 2 ;;
        *) usage ;;
    esac
done
[ $# -eq 1 ] && [[ $1 != -* ]] && [[ $whole =~ ^[0-9]*$ ]] || usage
parts=${only//,/ }
for name in $parts; do [[ " build prove tests bench " = *" $name "* ]] || usage; done
root=$(cd "$(dirname "$0")/.." && pwd) || exit 2
python=$(command -v "${PYTHON:-python3}") || exit 2
"$python" "$root/bench/preflight.py" $parts >&2 || exit 2
gpu='import sys, torch; sys.exit(not torch.cuda.is_available())'
if [ -z "$smoke" ] && ! "$python" -c "$gpu"; then
    echo "torch.cuda sees no GPU: nothing to record (bench/gpu_record.sh --smoke OUT tests the script)" >&2
    exit 2
fi
mkdir -p "$1/logs" && out=$(cd "$1" && pwd) && cd "$root" || exit 2
commit=$(git describe --always --dirty --exclude '*' 2>/dev/null || echo unknown)
# Everything that is not a result: compiled kernels, and the package as it is installed, of links to the sources.
tree=${TMPDIR:-/tmp}/inr_kernels_record_$(id -u)_$(echo "$root" | cksum | cut -d ' ' -f 1)
export PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=$tree/triton
[ -n "$smoke" ] && rm -rf "$tree" && export TRITON_INTERPRET=1 OMP_NUM_THREADS=1
mkdir -p "$tree/inr_kernels" "$tree/results"
failed=() benches=() ops=()
for file in bench/bench_*.py; do
    name=$(basename "${file#bench/bench_}" .py)
    benches+=("$name")
    [ -d "inr_kernels/$name" ] && ops+=("$name")
done
chosen() { [[ " $parts " = *" $1 "* ]]; }

# step NAME SECONDS COMMAND...: runs a command for at most so long, within the time of the whole, unless it has passed;
# prints its status, which is also the last line of its log.
step() {
    local name=$1 limit=$2 began=$SECONDS status log=$out/logs/$1.log
    shift 2
    if tail -n 1 "$log" 2>/dev/null | grep -qF "== ok, $commit,"; then
        echo "kept    $name"
        return 0
    fi
    [ -n "$whole" ] && [ $((whole - SECONDS)) -lt "$limit" ] && limit=$((whole - SECONDS))
    [ -n "$smoke" ] && limit=600 # only the steps are tested, not their time
    if [ "$limit" -lt 1 ]; then
        status=124
        echo "no time was left" >"$log"
    else
        timeout -k 5 "$limit" "$@" >"$log" 2>&1
        status=$?
    fi
    local took="$((SECONDS - began)) s"
    case $status in
        0) echo "ok      $name, $took" && echo "== ok, $commit, $took" >>"$log" ;;
        124 | 137) echo "STOPPED $name after $took: out of time" && echo "== stopped after $took" >>"$log" ;;
        *)
            printf '%s\n' "FAILED  $name ($status), $took" "$(tail -n 3 "$log")"
            echo "== failed ($status), $took" >>"$log"
            ;;
    esac
    return "$status"
}

# ---- build: into $tree, with the headers of torch where pybind11 is not installed.
build() {
    "$python" -c 'import torch; print(*torch.cuda.get_device_capability(), sep="")' >"$tree/arch" || return
    export CUDAARCHS=${CUDAARCHS:-$(cat "$tree/arch")-real} # code for this GPU only
    cmake -S "$root" -B "$tree/build" -DPython_EXECUTABLE="$python" "$("$python" bench/preflight.py --pybind11)" &&
        cmake --build "$tree/build" --parallel "$(nproc)" && cp "$tree"/build/_C*.so "$tree/inr_kernels/"
}
export -f build
export root tree python
if [ -z "$smoke" ]; then
    nvidia-smi >"$out/logs/machine.log" 2>&1
    for path in "$root"/* "$root"/inr_kernels/*; do
        [[ $path = */_C.*.so || $path = */inr_kernels || $path = "$root/build" ]] && continue
        ln -sfn "$path" "$tree${path#"$root"}"
    done
    ln -sfn "$root/models" "$tree/inr_kernels/models"
    if chosen build || [ -z "$(find "$tree/inr_kernels" -name '_C*.so')" ]; then
        rm -f "$out/logs/build.log" # a machine may be another one
        step build 900 bash -c build || failed+=(build)
    fi
    cd "$tree" || exit 2
    export PYTHONPATH=$tree
fi
# Warnings are not errors here: they depend on the machine's other packages.
pytest=("$python" -m pytest -q -p no:cacheprovider -W default)
parallel() { # the status of a step in the background reaches the end through a file
    { step "$@" || echo "$1" >>"$tree/failed"; } &
}
rm -f "$tree/failed" && touch "$tree/began"

# ---- prove: verdicts of an earlier call are kept, also where this machine has none yet.
if chosen prove; then
    verdicts=$("$python" -c 'from inr_kernels._core import verdicts; print(verdicts.file())')
    [ -n "$smoke" ] && verdicts=$tree/cache/inr-kernels/verdicts.json && export XDG_CACHE_HOME=$tree/cache
    if [ -s "$out/verdicts.json" ] && [ ! -e "$verdicts" ]; then
        mkdir -p "$(dirname "$verdicts")" && cp "$out/verdicts.json" "$verdicts"
    fi
    what=(--missing)
    [ -n "$smoke" ] && what=(--device cpu --quick --op conv3x3 --dtype float32)
    step prove 7200 "$python" -m inr_kernels prove "${what[@]}" || failed+=(prove)
    [ -s "$verdicts" ] && cp "$verdicts" "$out/verdicts.json"
fi

# ---- tests: in parallel processes, as they compile most of the time, and an invalid access ends only its own process.
if chosen tests && [ -n "$smoke" ]; then
    step tests 60 "${pytest[@]}" tests/ops/test_on_gpu.py -m gpu --collect-only || failed+=(tests)
    step check-elementwise_filter 60 "$python" -m bench.one_call elementwise_filter --small --backend triton ||
        failed+=(check-elementwise_filter)
elif chosen tests; then
    for op in "${ops[@]}"; do
        for dtype in float32 bfloat16 "float16 and not bfloat16"; do
            parallel "tests-$op-${dtype%% *}" 600 \
                "${pytest[@]}" tests/ops/test_on_gpu.py -m gpu -k "$op and $dtype"
        done
    done
    parallel tests-models 600 "${pytest[@]}" tests/ops/test_on_gpu.py -m gpu -k "graphed or large"
    mapfile -t others < <(grep -lE '^(@|pytestmark = )pytest\.mark\.gpu' tests/*/test_*.py | grep -v test_on_gpu)
    parallel tests-others 600 "${pytest[@]}" "${others[@]}" -m gpu
    wait
    sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -n 1)
    for op in "${ops[@]}"; do
        for tool in memcheck racecheck; do # one allocation per tensor, so that memcheck sees its bounds
            [ -z "$sanitizer" ] && continue
            check=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --error-exitcode 9
                "$python" -m bench.one_call "$op" --small)
            if [ "$tool" = racecheck ]; then
                { step "$tool-$op" 300 "${check[@]}" || echo "        (reported, not counted)"; } &
            else
                parallel "$tool-$op" 300 "${check[@]}"
            fi
        done
    done
    wait
fi

# ---- bench: first with an empty cache of compiled kernels, the time to the first result; then all benchmarks.
results=bench/results
if chosen bench; then
    for op in "${ops[@]}"; do
        small=()
        [ -n "$smoke" ] && small=(--small)
        if [ -z "$smoke" ] || [ "$op" = elementwise_filter ]; then
            cache=$tree/triton-first-$op
            rm -rf "$cache"
            step "first-$op" 120 env TRITON_CACHE_DIR="$cache" "$python" -m bench.one_call "$op" "${small[@]}" ||
                failed+=("first-$op")
        fi
    done
    if [ -n "$smoke" ]; then
        results=$tree/results
        step bench 60 "${pytest[@]}" bench/bench_fourier_unit.py --benchmark-only --tiny --results "$results" \
            -k bench_unit || failed+=(bench)
    else
        for file in "$out"/*.json; do # of an earlier call: later rows are added
            name=$(basename "$file")
            [ -s "$file" ] && [ "$name" != verdicts.json ] && [ ! -e "$results/$name" ] && cp "$file" "$results/$name"
        done
        for bench in "${benches[@]}"; do
            step "bench-$bench" 300 "${pytest[@]}" "bench/bench_$bench.py" --benchmark-only -k "not compile" ||
                failed+=("bench-$bench")
        done
        for file in $(grep -l '"compile' bench/bench_*.py); do # torch.compile takes the longest
            name=compile-$(basename "$file" .py)
            step "$name" 300 "${pytest[@]}" "$file" --benchmark-only -k compile --add || failed+=("$name")
        done
    fi
    echo
    table=$(find -L "$results" -name '*.json' -newer "$tree/began" 2>/dev/null | head -n 1)
    if [ -n "$table" ]; then
        cp "$table" "$out/"
        "$python" -m bench.report "$table" | tee "$out/table.txt"
    fi
fi
[ -e "$tree/failed" ] && mapfile -t -O "${#failed[@]}" failed <"$tree/failed"
[ -n "$smoke" ] && rm -rf "$tree"
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed steps: ${failed[*]}"
    exit 1
fi
