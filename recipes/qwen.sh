#!/usr/bin/env bash
# The paper's Tables 1 and 2 with Qwen2.5-Instruct of one size: SFT, GRM, BT, DPO, PPO (BT), PPO (GRM) and CPE, then win
# rates of all policies against GPT-4o's answers, on PersonaFeedback's questions, AlpacaEval and PersonaMem. It ends in
# one table. The scripts' defaults are the paper's hyperparameters (docs/method.md 1.10). The memory plans come first. Run
# it again to resume an interrupted run.
#
#   bash recipes/qwen.sh 0.5b    # one GPU of 80 GB, 32 prompts a step instead of the paper's 128: a complete run to look at
#   bash recipes/qwen.sh 7b      # 8 x 80 GB; the GRM runs in the processes that train
#   bash recipes/qwen.sh 14b     # the same; the paper's GRM had two further GPUs
#
#   bash recipes/qwen.sh SIZE                               # judgements.jsonl is in DATA (data/annotate.py)
#   bash recipes/qwen.sh SIZE --judge URL                   # no GRM is trained: rewards are those of that server
#   bash recipes/qwen.sh SIZE PERSONAS QUESTIONS FLAGS...   # makes the rows first (recipes/own_data.sh, data/annotate.py)
#   PLAN_ONLY=1 MODEL=FOLDER bash recipes/qwen.sh SIZE      # needs no GPU, and only config.json of the model
#
# STAGES       some of rows, sft, grm, bt, dpo, ppo_bt, ppo_grm, cpe, evaluate. Stage rows fetches the public rows that
#              DATA lacks
# MODEL        folder or hub id; GRM_MODEL: the same for a GRM of another size
# DATA, OUT    rows; run folders OUT/STAGE, and OUT/evaluate/table.md
# JUDGE        OpenAI-compatible server of the GRM in RL. EVALUATION_JUDGE, BASELINE: GPT-4.1 and GPT-4o of api.openai.com
# BENCHMARKS   prompt rows in DATA. PEERS: servers (URL#NAME) whose answers are evaluated too
# GPUS, GIB    number of ranks; memory of a GPU: GIB=24 plans for a smaller card
# SFT_FLAGS, GRM_FLAGS, BT_FLAGS, DPO_FLAGS, RL_FLAGS, EVALUATION_FLAGS   further flags
set -euo pipefail
usage="usage: bash recipes/qwen.sh 0.5b|7b|14b [PERSONAS QUESTIONS FLAGS... | --judge URL]"
cd "$(dirname "$0")/.."
source recipes/environment.sh
SIZE=${1:?$usage}
shift

DATA=${DATA:-out/data}
OUT=${OUT:-out/qwen$SIZE}
JUDGE=${JUDGE:-}
if [ "${1:-}" = --judge ]; then
    JUDGE=${2:?$usage}
    shift 2
fi
rl=(--prompts "$DATA/prompts_train.jsonl") # which --edit-loss to take: docs/method.md 2.1
stages="rows sft grm bt dpo ppo_bt ppo_grm cpe evaluate"
[ -z "$JUDGE" ] || stages=${stages/ grm/} # a judge is given: no GRM is trained
[ "$SIZE" != 0.5b ] || GPUS=${GPUS:-1}
GPUS=${GPUS:-8}
case $SIZE in
    0.5b)
        MODEL=${MODEL:-Qwen/Qwen2.5-0.5B-Instruct}
        rl+=(--prompts-per-step 32 --mini-batch-prompts 16 --checkpoint-activations)
        ;;
    7b)
        MODEL=${MODEL:-Qwen/Qwen2.5-7B-Instruct}
        # all originals of a step run at once; without KV caches, the passes need neither recomputation nor --offload
        shared=$((GPUS < 4 ? GPUS : 4)) # ranks of an engine
        rl+=(--tensor-parallel $shared --max-batch $((64 * shared)) --release-cache)
        rl+=(--tokens-per-microbatch 4096 --save-in-background)
        ;;
    14b)
        MODEL=${MODEL:-Qwen/Qwen2.5-14B-Instruct}
        shared=$((GPUS < 8 ? GPUS : 8))
        rl+=(--tensor-parallel $shared --max-batch $((64 * shared)) --release-cache)
        rl+=(--tokens-per-microbatch 8192 --checkpoint-activations --offload)
        ;;
    *) echo "$usage" >&2; exit 2 ;;
esac
GIB=${GIB:-80}
GRM_MODEL=${GRM_MODEL:-$MODEL}
BASELINE=${BASELINE:-https://api.openai.com/v1#gpt-4o}
EVALUATION_JUDGE=${EVALUATION_JUDGE:-pair:https://api.openai.com/v1#gpt-4.1}
read -r -a stages <<< "${STAGES:-$stages}"
read -r -a peers <<< "${PEERS:-}"
for name in SFT GRM BT DPO RL EVALUATION; do
    flags=${name}_FLAGS
    read -r -a "${name,,}_flags" <<< "${!flags:-}"
done

stage() { # stage NAME POLICY GRM BT: sets `command` to script and flags; the models are those of earlier stages
    local without_edits=(--edit-rate 0 --n-samples 6) # as many trained responses as 4 originals and 2 edits
    case $1 in
        sft) command=(sft.py --model "$MODEL" --data "$DATA/pairs.jsonl" "${sft_flags[@]}") ;;
        grm) command=(train_grm.py --model "$GRM_MODEL" --data "$DATA/judgements.jsonl" "${grm_flags[@]}") ;;
        bt) command=(train_grm.py --objective bt --model "$MODEL" --data "$DATA/pairs.jsonl" "${bt_flags[@]}") ;;
        dpo) command=(dpo.py --model "$2" --data "$DATA/pairs.jsonl" "${dpo_flags[@]}") ;;
        ppo_bt) command=(ppo_cpe.py --model "$2" --judge "bt:$4" "${without_edits[@]}" "${rl[@]}" "${rl_flags[@]}") ;;
        ppo_grm) command=(ppo_cpe.py --model "$2" --judge "$3" "${without_edits[@]}" "${rl[@]}" "${rl_flags[@]}") ;;
        cpe) command=(ppo_cpe.py --model "$2" --judge "$3" "${rl[@]}" "${rl_flags[@]}") ;;
        *) echo "STAGES: $1 is none of rows, sft, grm, bt, dpo, ppo_bt, ppo_grm, cpe, evaluate" >&2; exit 2 ;;
    esac
    command+=(--out "$OUT/$1")
    case $1 in sft | grm | bt | dpo) command+=(--checkpoint-activations) ;; esac
}
say() { printf '\n== %s (minute %s)\n' "$1" "$((SECONDS / 60))"; }
ranks() { torchrun --standalone --shutdown-timeout 600 --nproc_per_node="$GPUS" "$@"; }

rows() { # a source is read only if DATA lacks its rows
    local feedback=PersonalAILab/PersonaFeedback
    [ -f "$DATA/prompts_train.jsonl" ] || python data/prepare.py --source "$feedback" --out "$DATA"
    for benchmark in ${BENCHMARKS:-alpaca_eval personamem_32k}; do
        [ ! -f "$DATA/$benchmark.jsonl" ] || continue
        case $benchmark in
            alpaca_eval) python data/prepare.py --source tatsu-lab/alpaca_eval --personas "$feedback" --out "$DATA" ;;
            personamem_*) python data/prepare.py --source bowen-upenn/PersonaMem --out "$DATA" ;;
            *) echo "BENCHMARKS: there is no $DATA/$benchmark.jsonl" >&2; exit 2 ;;
        esac
    done
}
evaluate() { # every policy that is there, by one journal: the baseline answers each question once
    local policies=("base=$MODEL") questions=prompts_eval results=$OUT/evaluate
    for name in sft dpo ppo_bt ppo_grm cpe; do
        [ ! -f "$OUT/$name/policy/README.md" ] || policies+=("$name=$OUT/$name/policy") # the card of a finished run
    done
    for url in "${peers[@]}"; do
        policies+=("${url##*#}=$url")
    done
    [ ! -f "$DATA/prompts_winrate.jsonl" ] || questions=prompts_winrate # with the baseline's answers as the paper has them
    read -r -a benchmarks <<< "${BENCHMARKS:-$questions alpaca_eval personamem_32k}"
    for benchmark in "${benchmarks[@]}"; do
        local out annotations=() baseline=$BASELINE n_prompts=0
        [ "$benchmark" != prompts_winrate ] || baseline=reference
        [ "$benchmark" != prompts_eval ] || n_prompts=300
        for policy in "${policies[@]}"; do
            out=$results/$benchmark/${policy%%=*}
            say "evaluation: $out"
            ranks evaluate.py --model "${policy#*=}" --baseline "$baseline" --judge "$EVALUATION_JUDGE" --out "$out" \
                --prompts "$DATA/$benchmark.jsonl" --n-prompts "$n_prompts" --journal "$results" "${evaluation_flags[@]}"
            annotations+=("$out/annotations.json")
        done
        python evaluate.py --annotations "${annotations[@]}" --out "$results/$benchmark" "${evaluation_flags[@]}"
    done
    say "the table: $results/table.md"
    python recipes/benchmark_table.py --folder "$results" --benchmarks "${benchmarks[@]}" --models "${policies[@]%%=*}"
}

for name in "${stages[@]}"; do # what each will hold in memory; the recipe stops here if that does not fit
    case $name in rows | evaluate) continue ;; esac
    stage "$name" "$MODEL" "${JUDGE:-$GRM_MODEL}" "$MODEL"
    printf '\n== plan of %s\n' "$name"
    python "${command[@]}" --plan --world-size "$GPUS" --gpu-gib "$GIB"
done
[ -z "${PLAN_ONLY:-}" ] || exit 0

# from where this command was given, since tables are named from there
[ $# = 0 ] || (root=$PWD && cd "$OLDPWD" && DATA=$DATA STAGES=data bash "$root/recipes/own_data.sh" "$@")
case " $* " in *" --plan "*) exit 0 ;; esac # it was a plan of the data alone
for name in "${stages[@]}"; do
    case $name in
        rows | evaluate) "$name" ;;
        *)
            say "$name: $OUT/$name"
            stage "$name" "$OUT/sft/policy" "${JUDGE:-$OUT/grm/model}" "$OUT/bt/model"
            ranks "${command[@]}"
            ;;
    esac
done
