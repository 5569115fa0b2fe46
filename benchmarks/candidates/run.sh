#!/usr/bin/env bash
# What the candidates are, on one Hopper GPU: `bash benchmarks/candidates/run.sh PART`, with the patch applied.
#   train    whether the kernels of training are right, how fast, and what they are to steps (4 to 8 minutes)
#   serve    products and prompts in FP8, beside bf16 and weights made dense                 (5 to 8 minutes)
#   ready    rehearsal of one layer of each kind; sizes of launches by plain Python          (4 to 7 minutes)
#   rest     larger steps in FP8, and what on main has not run on a GPU                      (5 to 8 minutes)
# Each job has a limit of its own and goes on whatever became of the one before; none begins after 450 seconds.
# JSON and what was printed go to $OUT (runs/candidates where there is none); the end says which job passed.
cd "$(dirname "$0")/../.." || exit 1
export PYTHONPATH=$PWD OUT=${OUT:-$PWD/runs/candidates} PYTHONUNBUFFERED=1
mkdir -p "$OUT"
summary=()

job() { # NAME SECONDS SCRIPT ARGUMENTS...
    local name=$1 limit=$2 begin=$SECONDS rc
    shift 2
    if ((begin > 450)); then
        summary+=("$name: not begun")
        return
    fi
    ((limit = limit < 495 - begin ? limit : 495 - begin))
    echo "== $name, at most $limit s: $*"
    timeout -k 5 "$limit" "${PYTHON:-python3}" "$@" >"$OUT/$name.log" 2>&1
    rc=$?
    summary+=("$name: rc $rc after $((SECONDS - begin)) s")
    grep -E '"failed"|"passed": false|Error' "$OUT/$name.log" | cut -c1-300 | head -12
    tail -n 6 "$OUT/$name.log" | cut -c1-240
}

case ${1:-train} in
train)
    job fp8-check 120 benchmarks/training_fp8.py --parts check --out "$OUT/training_fp8.json"
    job kernels-check 150 benchmarks/training_kernels.py --parts check --out "$OUT/training_kernels.json"
    job fp8-quantise 60 benchmarks/training_fp8.py --parts quantise --out "$OUT/training_fp8.json"
    job kernels-time 90 benchmarks/training_kernels.py --parts time --out "$OUT/training_kernels.json"
    job kernels-step 240 benchmarks/training_kernels.py --parts step --shapes 1b wide-bf16 wide-fp8 wide-fp8-dense \
        --out "$OUT/training_kernels.json"
    ;;
serve)
    job products 200 benchmarks/engine_gpu_packed.py --products --formats --out "$OUT/products.json"
    job packed 420 benchmarks/engine_gpu_packed.py --prefill --formats none fp8 --batches 64 256 --out "$OUT/packed.json"
    ;;
ready)
    work=$(mktemp -d)
    job ready-bf16 240 benchmarks/ready_gpu.py --dir "$work" --rounds 1 --out "$OUT/ready_gpu.json"
    job ready-fp8 150 benchmarks/ready_gpu.py --dir "$work" --rounds 1 --quantize fp8 --out "$OUT/ready_gpu_fp8.json"
    rm -r "$work"
    job prompt-steps 150 benchmarks/engine_gpu.py --batches --lazy --prompt-steps --out "$OUT/engine_gpu.json"
    ;;
rest)
    job kernels-large 180 benchmarks/training_kernels.py --parts step --shapes large-bf16 large-fp8 large-fp8-dense \
        --out "$OUT/training_kernels_large.json"
    job kernels-profile 90 benchmarks/training_kernels.py --parts profile --shapes wide-fp8 wide-fp8-dense \
        --out "$OUT/training_kernels_profile.json"
    job dry-run 240 benchmarks/dry_run.py --out "$OUT/dry_run.json"
    ;;
*)
    echo "there are the parts train, serve, ready and rest, not $1" >&2
    exit 2
    ;;
esac
printf '%s\n' "${summary[@]}"
