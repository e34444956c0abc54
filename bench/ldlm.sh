#!/usr/bin/env bash
# LDLM beside TextLDM, and what each of its four parts does: the tables of bench/RESULTS.md for one corpus. Two seeds, side by side (on a GPU one after the other).
# `even` is TextLDM of as many steps in all as LDLM, so of as many tokens; `long` is TextLDM of about as many seconds.
#
#     bash bench/ldlm.sh docs                        # then: cat out/ldlm_docs/eval.md
#     bash bench/ldlm.sh names
#     LONG="500 1400" bash bench/ldlm.sh docs        # other steps of long's VAE and DiT, where your machine's seconds are others
set -euo pipefail
cd "$(dirname "$0")/.."
corpus=${1:-docs}
case $corpus in
    docs) steps=800 even="300 500" long=${LONG:-500 1000} ;;
    names) steps=300 even="150 150" long=${LONG:-300 300} ;;
    *) echo "error: docs or names" >&2; exit 2 ;;
esac
. bench/stages.sh $corpus "" out/ldlm_$corpus

two_stages() {  # two_stages FOLDER SEED VAE_STEPS DIT_STEPS
    once $1 train_vae.py $rows --seed=$2 --max_steps=$3 --learning_rate=1e-3 --teacher=$out/s$2/gpt.pt
    once $1 train_dit.py $rows --seed=$2 --max_steps=$4
}
seed() {
    local joint="train_dit.py --joint $rows --seed=$1 --max_steps=$steps --eval_interval=$((steps / 2)) --encoder_warmup=$((steps / 2)) --teacher=$out/s$1/gpt.pt"
    once $out/s$1 bench/train_gpt.py $rows --seed=$1 --max_steps=500
    once $out/ldlm$1 $joint
    two_stages $out/long$1 $1 $long
    two_stages $out/even$1 $1 $even
    once $out/naive$1 $joint --no-hidden_mse --encoder_warmup=0 --no-adaptive_times --decoder_noise=0
    once $out/mse$1 $joint --no-hidden_mse
    once $out/noise$1 $joint --decoder_noise=0
    once $out/times$1 $joint --no-adaptive_times
    once $out/warmup$1 $joint --encoder_warmup=0
}
both_seeds

systems=real
for s in 1 2; do
    systems+=",gpt $s=gpt:$out/s$s/gpt.pt,even $s=textldm:$out/even$s,long $s=textldm:$out/long$s,ldlm $s=textldm:$out/ldlm$s,naive $s=textldm:$out/naive$s"
    for part in mse noise times warmup; do systems+=",no $part $s=textldm:$out/$part$s"; done
done
python bench/evaluate.py --data=$data --out=$out --n=400 --steps=20 --evaluator=$evaluator/gpt.pt --cfg=3 --temperature=0.7,1 --systems="$systems"
