#!/usr/bin/env bash
# The whole pipeline in the generated world, on two CPU cores: base -> SFT -> GRM and BT -> PPO (BT), PPO (GRM), CPE
# -> evaluation by the exact judge. It ends in one table. Everything is under OUT; run it again to resume an
# interrupted run. Independent stages run side by side, and their lines start with [NAME].
#
#   bash recipes/tiny.sh                             # a quarter of an hour
#   OUT=out/quick SCALE=0.05 bash recipes/tiny.sh    # does it run? Too few steps for a meaningful table
#   UNTIL=checks SEED=1 OUT=out/tiny1 bash recipes/tiny.sh    # the models that RL starts from, and their sanity checks
#
# RARITY is how often newly written answers hold what critiques ask for. By default none does: SFT never shows it, critiques
# name it, and edits bring it in. Where samples have it anyway (RARITY=0.1), plain PPO finds it as fast (docs/results.md).
# The loss on edits is `none`, not the default: without importance weights, words that sampling never draws count in
# full (docs/method.md 2.1).
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/environment.sh
source recipes/jobs.sh
source recipes/world_flags.sh

OUT=${OUT:-out/tiny}
SCALE=${SCALE:-1}
SEED=${SEED:-0}
RARITY=${RARITY:-0}

WORLD=$OUT/world
scaled() { python -c "print(max($2, round($1 * $SCALE)))"; } # scaled STEPS_OF_THE_FULL_RECIPE AT_LEAST
EVAL_PROMPTS=$(scaled 200 20)
stage() { printf '\n== %s (minute %s)\n' "$1" "$((SECONDS / 60))"; }

stage "the generated world"
made_with "$WORLD" "SEED=$SEED RARITY=$RARITY"
[ -f "$WORLD/judgements_eval.jsonl" ] ||
    python data/persona_world.py --out "$WORLD" --seed "$SEED" --rarity "$RARITY" "$RARITY"

stage "base: from random weights, on answers, rewrites and judgements of mixed quality; two data-parallel processes"
torchrun --nproc_per_node=2 sft.py --from-scratch "$WORLD/tokenizer" --data "$WORLD/base_corpus.jsonl" \
    --out "$OUT/base" "${BASE_FLAGS[@]}" --max-steps "$(scaled 1248 200)" --seed "$SEED"

stage "SFT on the chosen answers, then BT on the pairs; beside them the GRM: checks, critique and scores"
marked SFT python sft.py --model "$OUT/base/policy" --data "$WORLD/pairs.jsonl" --out "$OUT/sft" "${SFT_FLAGS[@]}" \
    --max-steps "$(scaled 62 2)" --seed "$SEED" &&
    marked BT python train_grm.py --objective bt --model "$OUT/base/policy" --data "$WORLD/pairs.jsonl" \
        --out "$OUT/bt" "${BT_FLAGS[@]}" --max-steps "$(scaled 62 2)" --seed "$SEED" \
        --eval-data "$WORLD/pairs_eval.jsonl" &
marked GRM python train_grm.py --model "$OUT/base/policy" --data "$WORLD/judgements.jsonl" --out "$OUT/grm" \
    "${GRM_FLAGS[@]}" --max-steps "$(scaled 310 80)" --seed "$SEED" --eval-data "$WORLD/judgements_eval.jsonl" \
    --eval-max-new-tokens 96 &
all_done

stage "sanity checks: does the policy read profiles, does the GRM judge well?" # a shortened run fails them and goes on
python recipes/sanity_checks.py --world "$WORLD" --policy "$OUT/sft/policy" --grm "$OUT/grm/model" \
    --out "$OUT/checks" --tolerant || [ "$SCALE" != 1 ]
[ "${UNTIL:-}" != checks ] || exit 0

stage "RL from the SFT policy: PPO rewarded by BT, then PPO rewarded by the GRM; beside them critique-post-edit. Then \
answers to unseen people's questions, scored by the exact judge, against those of SFT"
rl=(--model "$OUT/sft/policy" --prompts "$WORLD/prompts_train.jsonl" "${RL_FLAGS[@]}" --lr 5e-5
    --max-steps "$(scaled 40 2)" --seed "$SEED")
mkdir -p "$OUT/eval"
evaluate() { # evaluate NAME...: one after the other
    for name in "$@"; do
        echo "evaluating $name"
        python evaluate.py --model "$OUT/$name/policy" --baseline "$OUT/sft/policy" \
            --prompts "$WORLD/prompts_eval.jsonl" --n-prompts "$EVAL_PROMPTS" "${EVALUATION_FLAGS[@]}" --seed "$SEED" \
            --out "$OUT/eval/$name" > "$OUT/eval/$name.log" 2>&1 || { cat "$OUT/eval/$name.log"; return 1; }
    done
}
marked "PPO (BT)" python ppo_cpe.py "${rl[@]}" --judge "bt:$OUT/bt/model" "${PPO_FLAGS[@]}" --out "$OUT/ppo_bt" &&
    marked "PPO (GRM)" python ppo_cpe.py "${rl[@]}" --judge "$OUT/grm/model" "${PPO_FLAGS[@]}" --out "$OUT/ppo_grm" &&
    evaluate ppo_grm &
marked CPE python ppo_cpe.py "${rl[@]}" --judge "$OUT/grm/model" --edit-loss none --edit-below 4.7 \
    --out "$OUT/cpe" && evaluate cpe base sft &
all_done
evaluate ppo_bt

stage "done; $EVAL_PROMPTS questions"
python recipes/tiny_table.py --checks "$OUT/checks" --edits-of "$OUT/cpe" --runs "base=$OUT/eval/base" \
    "SFT=$OUT/eval/sft" "PPO (BT)=$OUT/eval/ppo_bt" "PPO (GRM)=$OUT/eval/ppo_grm" "CPE=$OUT/eval/cpe" |
    tee "$OUT/table.txt"
python report.py "$OUT/cpe" --compare "$OUT/ppo_grm" "$OUT/ppo_bt" "$OUT/grm" \
    "$OUT/eval/"{cpe,ppo_grm,ppo_bt,sft} --exact-judge data/persona_world.py:judge --out "$OUT/report.html"
cat << END

All three RL runs start from SFT and train on as many responses; PPO (GRM) and CPE have the same judge. No answer that SFT
learns says a topic's last step or advice that suits the person. PPO can learn them only once a sample happens to
hold them. Critiques name them and edits write them, so CPE is expected to say them, for fewer judge calls and about as
many tokens. The GRM checks each claim against the profile before it scores, so wrong facts are not expected to grow
under it. BT learned from labels that favour length and recitation, so its reward is expected to be hacked. (The base
has read rewrites under critiques and answers that were rewritten before, so it sometimes gives the advice; SFT takes
that away.)

CPE beside PPO:          $OUT/report.html, in a browser: curves, each critique and edit, answers by prompt
A conversation with it:  python generate.py --model $OUT/cpe/policy --persona $WORLD/example_persona.json
                         Ask as in $WORLD/example_questions.txt, for example: How do I host a dinner?
                         It knows the attributes of example_persona.json and no others; what a profile lacks it makes up.
Rollouts as rows:        $OUT/cpe/rollouts/step_*.jsonl (answer, critique, scores, edit)
END
