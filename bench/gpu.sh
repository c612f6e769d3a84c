#!/usr/bin/env bash
# Everything that only a GPU can show, in one command and ten minutes, without network: do the kernels, the engine, the
# stages and several ranks give what they give on a CPU, and how fast are they? Each stage has its time limit and its
# log; one that fails does not stop the others. It ends in OUT/table.md and a summary line, status 1 if a stage failed.
#
#   bash bench/gpu.sh                              # torch 2.13, triton 3.7; flash-attn if it is there
#   WHEELS=FOLDER bash bench/gpu.sh                # first installs what it needs from wheels in a folder
#   STAGES="versions engine" bash bench/gpu.sh     # only these
#   EMULATED=1 bash bench/gpu.sh                   # without a GPU, on tests/emulated_gpu.py: does the command itself run?
#
# It needs what `python bench/gpu.py versions` lists (the scripts import httpx2; no server is asked).
set -uo pipefail
cd "$(dirname "$0")/.."
[ "${1:-}" != --help ] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' bench/gpu.sh; exit; }
OUT=${OUT:-out/gpu}
BUDGET=${BUDGET:-600} # seconds for all
STAGES=${STAGES:-}
EMULATED=${EMULATED:-}
export EMULATED TOKENIZERS_PARALLELISM=false
[ ! -f "$OUT/stages.txt" ] || rm -rf "$OUT" # of an earlier run
mkdir -p "$OUT"
[ ! -x .venv/bin/python ] || export PATH="$PWD/.venv/bin:$PATH"
: > "$OUT/stages.txt"

python=(python)
[ -z "$EMULATED" ] || python=(python tests/on_emulated_gpu.py)
if [ -n "${WHEELS:-}" ]; then
    python -m pip install --quiet --no-index --find-links "$WHEELS" \
        pytest hypothesis tyro pydantic tokenizers safetensors tqdm transformers numpy psutil httpx2 jinja2
fi

stage() { # stage NAME SECONDS COMMAND...
    local name=$1 limit=${LIMIT:-$2} left=$((BUDGET - SECONDS)) started=$SECONDS status=125
    shift 2
    [[ -z $STAGES || " $STAGES " == *" $name "* ]] || return 0
    ((limit < left)) || limit=$left
    if ((limit > 0)); then
        timeout --kill-after=10 "$limit" "$@" > "$OUT/$name.log" 2>&1
        status=$?
    else
        echo "the $BUDGET seconds are over" > "$OUT/$name.log"
    fi
    echo "$name $status $((SECONDS - started))" | tee -a "$OUT/stages.txt"
}
check() { stage "$1" "$2" "${python[@]}" bench/gpu.py "${@:3}"; }

check versions 60 versions
check attention 60 attention
check logprob 60 logprob
check engine 90 engine
[ -n "$EMULATED" ] || stage kernel-tests 150 python -m pytest -q \
    tests/test_kernels.py tests/test_linear_logprob.py tests/test_shared_prefix.py -k "not interpreter and not processes"

# the tiny pipeline, twice: fp32 must give the engine's log-probs, bf16 nearly so
source recipes/world_flags.sh
world=$OUT/world
rl=("${RL_FLAGS[@]}" --prompts "$world/prompts_train.jsonl" --lr 5e-5 --offload --checkpoint-activations --save-every 2)
base_steps=200 grm_steps=80 base_rows=6400 judgements=2600
if [ -n "$EMULATED" ]; then # too few steps for a judge that can be read
    base_steps=1 grm_steps=1 base_rows=200 judgements=100
    BASE_FLAGS+=(--batch-size 4) GRM_FLAGS+=(--batch-size 4)
    rl+=(--prompts-per-step 2 --mini-batch-prompts 1 --n-samples 2 --max-new-tokens 8)
fi
stage world 60 python data/persona_world.py --out "$world" --base-rows $base_rows --judgements $judgements \
    --train-prompts 100 --pairs 100 --eval-pairs 20 --eval-prompts 20
for dtype in fp32 bf16; do
    dir=$OUT/$dtype
    judge=$dir/grm/model
    [ -z "$EMULATED" ] || judge=data/persona_world.py:judge
    stage "$dtype-base" 90 "${python[@]}" sft.py --from-scratch "$world/tokenizer" --data "$world/base_corpus.jsonl" \
        --out "$dir/base" "${BASE_FLAGS[@]}" --max-steps $base_steps --dtype $dtype
    stage "$dtype-grm" 60 "${python[@]}" train_grm.py --model "$dir/base/policy" --data "$world/judgements.jsonl" \
        --out "$dir/grm" "${GRM_FLAGS[@]}" --max-steps $grm_steps --dtype $dtype
    ppo=("${python[@]}" ppo_cpe.py --model "$dir/base/policy" --judge "$judge" "${rl[@]}" --dtype $dtype)
    stage "$dtype-ppo" 90 "${ppo[@]}" --out "$dir/ppo" --max-steps 2
    stage "$dtype-resume" 90 "${ppo[@]}" --out "$dir/ppo" --max-steps 4 --deterministic
    stage "$dtype-mismatches" 20 python bench/gpu.py mismatches "$dir/ppo" "$([ $dtype = fp32 ] && echo 1e-3 || echo 0.25)"
done

gpus=0
[ -n "$EMULATED" ] || gpus=$(python -c 'import torch; print(torch.cuda.device_count())' 2> "$OUT/gpus.log" || echo 0)
if ((gpus > 1)); then
    stage ranks-1 60 python tests/update_once.py "$OUT/one_rank.pt" 10000 1
    files=("$OUT/one_rank.pt")
    for n in $(printf '%s\n' 2 "$gpus" | sort -nu); do
        stage "nccl-$n" 90 torchrun --nproc_per_node="$n" tests/update_once.py "$OUT/${n}_ranks.pt" 100 "$n"
        files+=("$OUT/${n}_ranks.pt")
    done
    stage hsdp 90 torchrun --nproc_per_node="$gpus" tests/update_once.py "$OUT/hsdp.pt" 100 $((gpus / 2))
    check nccl-updates 20 updates "${files[@]}" "$OUT/hsdp.pt"
    stage nccl-ppo 120 torchrun --nproc_per_node="$gpus" ppo_cpe.py --model "$OUT/bf16/base/policy" \
        --judge "$OUT/bf16/grm/model" "${rl[@]}" --shard-size $((gpus / 2)) --out "$OUT/nccl_ppo" --max-steps 4
    stage nccl-mismatches 20 python bench/gpu.py mismatches "$OUT/nccl_ppo" 0.25
    stage nccl-shared-engine 120 torchrun --nproc_per_node=2 ppo_cpe.py --model "$OUT/fp32/base/policy" \
        --judge "$OUT/fp32/grm/model" "${rl[@]}" --dtype fp32 --tensor-parallel 2 --release-cache --save-in-background \
        --out "$OUT/nccl_shared" --max-steps 4
    stage nccl-shared-mismatches 20 python bench/gpu.py mismatches "$OUT/nccl_shared" 1e-3
fi

if [ -z "$EMULATED" ]; then # times; what transformers takes comes last
    stage kernels 60 python bench/kernels.py
    stage generation 90 python bench/generate.py --shapes 0.5b 1.5b --workloads ragged "decode 256" --no-peers
    stage training 90 python bench/train.py --only logprob shared --repeats 2
    stage peers-training 90 python bench/train.py --only step --repeats 1
    stage peers 120 python bench/generate.py --shapes 0.5b --workloads ragged "decode 256"
fi
python bench/gpu.py table "$OUT"
