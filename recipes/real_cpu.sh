#!/usr/bin/env bash
# A real pretrained chat model through every stage, within an hour on two CPU cores: PersonaFeedback's personas,
# questions and pairs; SFT; a GRM trained until its judgements parse; three steps of PPO with critique-post-edit;
# evaluation; a chat. It shows that the pipeline works on real weights and text. Three steps don't improve a model.
#
#   bash recipes/real_cpu.sh CHECKPOINT [SOURCE]
#
# CHECKPOINT: folder or hub id of a small chat model (Qwen2.5, Qwen3 or Llama format). SOURCE: PersonaFeedback's
# files, a folder or hub id. Its questions are Chinese; for rows of your own there is recipes/own_data.sh.
# The GRM: PersonaFeedback has no judgements, so the GRM is trained on those of the generated world. It learns the form
# of a judgement, and little about the answers that it then scores.
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/environment.sh

CHECKPOINT=${1:?usage: bash recipes/real_cpu.sh CHECKPOINT [SOURCE]}
SOURCE=${2:-PersonalAILab/PersonaFeedback}
OUT=${OUT:-out/real_cpu}
DATA=$OUT/data
DTYPE=${DTYPE:-fp32}
small=(--tokens-per-microbatch 4096 --max-length 2048 --dtype "$DTYPE")
stage() { printf '\n== %s (minute %s)\n' "$1" "$((SECONDS / 60))"; }

stage "data"
python data/prepare.py --source "$SOURCE" --out "$DATA"
[ -f "$OUT/world/judgements_eval.jsonl" ] || python data/persona_world.py --out "$OUT/world" --base-rows 1000 \
    --train-prompts 10 --pairs 10 --judgements 1000

stage "SFT: the chosen answers"
python sft.py --model "$CHECKPOINT" --data "$DATA/pairs.jsonl" --out "$OUT/sft" "${small[@]}" --batch-size 4 \
    --max-steps 4

stage "GRM: the world's judgements, with its short template"
python train_grm.py --model "$CHECKPOINT" --data "$OUT/world/judgements.jsonl" --out "$OUT/grm" "${small[@]}" \
    --grm-template "$OUT/world/tokenizer/templates/grm.txt" --batch-size 8 --epochs 1 --max-steps 40 --lr 2e-4 \
    --eval-data "$OUT/world/judgements_eval.jsonl" --eval-judgements 24 --eval-max-new-tokens 128
python - "$OUT/grm/held_out.json" <<'PYTHON'
import json, sys
parsed = json.load(open(sys.argv[1]))["parsed"]
if parsed < 0.75:
    sys.exit(f"{parsed:.0%} of the judgements parse; the GRM serves as a reward from 75 % on")
PYTHON

stage "PPO with critique-post-edit"
python ppo_cpe.py --model "$OUT/sft/policy" --judge "$OUT/grm/model" --prompts "$DATA/prompts_train.jsonl" \
    --out "$OUT/cpe" --prompts-per-step 2 --mini-batch-prompts 1 --n-samples 2 --max-prompt-length 1300 \
    --max-new-tokens 128 --judge-max-new-tokens 128 --epochs 4 --max-steps 3 --tokens-per-microbatch 4096 \
    --dtype "$DTYPE"

stage "evaluation: against the policy before RL"
python evaluate.py --model "$OUT/cpe/policy" --baseline "$OUT/sft/policy" --prompts "$DATA/prompts_eval.jsonl" \
    --judge "$OUT/grm/model" --n-prompts 4 --max-new-tokens 128 --judge-max-new-tokens 128 --out "$OUT/evaluate" \
    --dtype "$DTYPE"

stage "a chat with the result"
echo "What should I cook tonight?" | python generate.py --model "$OUT/cpe/policy" --max-new-tokens 64 --dtype "$DTYPE" \
    --persona '{"name": "Mia", "food": "vegan, loves spicy dishes", "time": "never more than 20 minutes"}'

stage "one rollout, and the metrics of the last step"
python - "$OUT/cpe" <<'PYTHON'
import glob, json, os, sys
files = sorted(glob.glob(os.path.join(glob.escape(sys.argv[1]), "rollouts", "*.jsonl")))
rows = [json.loads(line) for file in files for line in open(file)]
row = next((row for row in reversed(rows) if row["edit"]), None)
if row is None:
    sys.exit("no answer of the run has a judged edit")
for title, text in (("question", row["question"]), ("answer", row["answer"]), ("critique", row["critique"]),
                    ("scores", {k: row[k] for k in ("helpfulness", "personalization", "naturalness", "reward")}),
                    ("edit", row["edit"]["answer"]), ("its reward", row["edit"]["reward"])):
    print(f"-- {title}\n{text}")
print("-- metrics\n" + json.dumps(json.loads(open(f"{sys.argv[1]}/metrics.jsonl").read().splitlines()[-1]), indent=1))
PYTHON
