#!/usr/bin/env bash
# The main tables of docs/results.md. Trains all systems of a case, with two seeds, and judges them.
#
#     bash bench/reproduce.sh names             # or docs; writes out/names/eval.md
#     bash bench/reproduce.sh blocks            # Cola DLM with blocks of 4, 8 and 16, on docs
#     bash bench/reproduce.sh ldlm              # LDLM, and without each of its parts, on docs
#     bash bench/reproduce.sh long              # the README's networks after 100 epochs of names
#     bash bench/reproduce.sh kinds input.txt   # all kinds, some minutes each, on a text (docs)
#
# `kinds` judges a change to what all share, and fails if one repeats words ("thou thou thou"). What
# is done is not done again: SEEDS=1 and SEEDS=2 in two terminals, then a call that judges both.
set -euo pipefail
cd "$(dirname "$0")/.."
case=${1:?names, docs, blocks, ldlm, long or kinds}
text=docs vocabulary=2048 n=600
rows="--batch_size=96 --block_size=32" width="--n_head=4 --n_embd=192"
vae_rate=--learning_rate=1e-3 blocks=""
gpt_steps=500 vae_steps=500 dit_steps=4000 more_steps=0
case $case in
    names) text=names vae_steps=1000 dit_steps=2400 more_steps=1500 ;;
    docs) more_steps=3000 ;;
    blocks) dit_steps=1000 blocks="4 8 16" ;;
    ldlm) vae_steps=300 dit_steps=500 ;; # together as many as LDLM's
    long) text=names dit_steps=13000 more_steps=1500 ;;
    kinds) text=${2:-docs} vae_steps=300 dit_steps=600 blocks=4 n=200 SEEDS=${SEEDS:-1} ;;
    *) echo "error: $case is none of names, docs, blocks, ldlm, long and kinds" >&2 && exit 2 ;;
esac
[ "$text" != names ] || n=1000 vocabulary=4096 rows=""
[[ $case != long && $case != kinds ]] || width="" vae_rate="" gpt_steps=400 # the README's
data=data/$(basename "${text%.*}") out=out/$case

# The judge has a vocabulary of its own, so nats per token compare whatever the models' vocabulary.
[ -f "$data/train.bin" ] || python data/prepare.py "$text" --vocab_size=$vocabulary --out="$data"
[ -f "$data/judge/train.bin" ] ||
    python data/prepare.py "$text" --vocab_size=$((vocabulary / 2)) --out="$data/judge"

# once FOLDER SCRIPT OPTIONS... trains a stage to FOLDER, unless it was done before.
once() {
    local mark="$1/$(basename "$2" | tr ' ' _).done"
    [ ! -f "$mark" ] || return 0
    python $2 --data="$data" --out="$1" --overwrite "${@:3}"
    touch "$mark"
}
two_stages() {
    once $1 train_vae.py $net --max_steps=$vae_steps $vae_rate "${@:2}"
    once $1 train_dit.py $net --max_steps=$dit_steps ${recipe:-}
}

once "$out/judge" baselines/gpt.py --data="$data/judge" --seed=1234 --n_layer=6 --n_head=4 \
    --n_embd=256 --max_steps=1000
systems=real,unigram
for s in ${SEEDS:-1 2}; do
    net="$rows $width --seed=$s" o=$out/s$s
    once $o baselines/gpt.py $net --max_steps=$gpt_steps
    two_stages $o
    teacher=--teacher=$o/gpt.pt
    systems+=",GPT $s=gpt:$o/gpt.pt,TextLDM $s=textldm:$o"
    if [ $more_steps != 0 ]; then
        once $o/more baselines/gpt.py $net --max_steps=$more_steps
        systems+=",GPT with more steps $s=gpt:$o/more/gpt.pt"
    fi
    if [[ $case = names || $case = docs ]]; then
        two_stages $o/norepa --teacher=none
        recipe=--recipe=paper two_stages $o/paper $teacher --recipe=paper
        systems+=",TextLDM without REPA $s=textldm:$o/norepa,the paper's $s=textldm:$o/paper"
    fi
    if [[ $case = names || $case = kinds ]]; then
        once $o baselines/masked.py $net --max_steps=$dit_steps
        systems+=",masked diffusion $s=masked:$o/masked.pt"
    fi
    for b in $blocks; do
        folder=$o/blocks$b
        once $folder "variants/cola_dlm.py vae" $net $teacher --max_steps=$vae_steps $vae_rate
        once $folder "variants/cola_dlm.py dit" $net --max_steps=$dit_steps --latent_block=$b
        systems+=",blocks of $b $s=textldm:$folder"
    done
    [[ $case = ldlm || $case = kinds ]] || continue
    parts="--no-hidden_mse --decoder_noise=0 --no-adaptive_times --encoder_warmup=0"
    [ $case = ldlm ] || parts=""
    for part in "" ${parts:+$parts "$parts"}; do # LDLM, without each part, and with none
        once "$o/ldlm${part// /}" variants/ldlm.py $net $teacher --max_steps=800 $part
        systems+=",LDLM${part//[=]/ } $s=textldm:$o/ldlm${part// /}"
    done
done

judge() {
    python bench/evaluate.py --data="$data" --evaluator="$out/judge/gpt.pt" --n=$n --steps=20 \
        --systems="$systems" --out="$out" --cfg=3 --temperature=0.5,0.7,1 "$@"
}
judge
[ $case != names ] || judge --unprompted --out=$out/unprompted --cfg=1
[ $case != long ] || judge --unprompted --out=$out/unprompted --keep=0,2,1
[ $case != kinds ] || python - "$out/eval.json" << 'EOF'
import json, sys

rows = json.load(open(sys.argv[1]))["systems"]
worst = max(rows, key=lambda name: rows[name]["repeated"])
if rows[worst]["repeated"] > rows["real"]["repeated"] + 10:
    sys.exit(f"error: {worst} repeats {rows[worst]['repeated']:.0f}% of its words")
EOF
