#!/usr/bin/env bash
# LDLM beside TextLDM, and without each of its four parts: the tables of docs/results.md for one
# corpus. Trains all systems with two seeds, and judges them in one run.
#
#     bash bench/ldlm.sh docs                        # then: cat out/ldlm_docs/eval.md
#     bash bench/ldlm.sh names
#     LONG="500 1400" bash bench/ldlm.sh docs        # other steps of `long`
#
# `even` is TextLDM whose VAE and DiT together have as many steps as LDLM, so as many tokens. `long`
# is TextLDM with about as many seconds. Its steps depend on the machine: LONG has those of the VAE
# and those of the DiT. On a CPU the two seeds run side by side, on a GPU one after the other.
set -euo pipefail
cd "$(dirname "$0")/.."
corpus=${1:-docs}
case $corpus in
    docs)
        steps=800
        even="300 500"
        long=${LONG:-500 1000}
        ;;
    names)
        steps=300
        even="150 150"
        long=${LONG:-300 300}
        ;;
    *)
        echo "error: docs or names" >&2
        exit 2
        ;;
esac
. bench/stages.sh $corpus "" out/ldlm_$corpus

# two_stages FOLDER SEED VAE_STEPS DIT_STEPS: trains TextLDM.
two_stages() {
    local folder=$1 s=$2 vae_steps=$3 dit_steps=$4
    once $folder train_vae.py $rows --seed=$s --max_steps=$vae_steps --learning_rate=1e-3 \
        --teacher=$out/s$s/gpt.pt
    once $folder train_dit.py $rows --seed=$s --max_steps=$dit_steps
}

# seed SEED: trains all systems.
seed() {
    local s=$1
    local half=$((steps / 2))
    local options="$rows --seed=$s --max_steps=$steps --eval_interval=$half --encoder_warmup=$half"
    options="$options --teacher=$out/s$s/gpt.pt"
    once $out/s$s baselines/gpt.py $rows --seed=$s --max_steps=500
    once $out/ldlm$s variants/ldlm.py $options
    two_stages $out/long$s $s $long
    two_stages $out/even$s $s $even
    # Of two options of the same name the last one counts.
    once $out/naive$s variants/ldlm.py $options --no-hidden_mse --encoder_warmup=0 \
        --no-adaptive_times --decoder_noise=0
    once $out/mse$s variants/ldlm.py $options --no-hidden_mse
    once $out/noise$s variants/ldlm.py $options --decoder_noise=0
    once $out/times$s variants/ldlm.py $options --no-adaptive_times
    once $out/warmup$s variants/ldlm.py $options --encoder_warmup=0
}
both_seeds

# Rows of the table, as LABEL=KIND:PATH. A label has no "=", ":" or ",", and ends with the seed.
systems=real
for s in 1 2; do
    systems+=",GPT $s=gpt:$out/s$s/gpt.pt"
    systems+=",TextLDM with as many tokens $s=textldm:$out/even$s"
    systems+=",TextLDM with as many seconds $s=textldm:$out/long$s"
    systems+=",LDLM $s=textldm:$out/ldlm$s"
    systems+=",LDLM with none of the four parts $s=textldm:$out/naive$s"
    systems+=",LDLM without the squared error $s=textldm:$out/mse$s"
    systems+=",LDLM without the decoder's noise $s=textldm:$out/noise$s"
    systems+=",LDLM without adaptive times $s=textldm:$out/times$s"
    systems+=",LDLM without the warm-up $s=textldm:$out/warmup$s"
done
python bench/evaluate.py --data=$data --out=$out --n=400 --steps=20 --cfg=3 --temperature=0.7,1 \
    --evaluator=$evaluator/gpt.pt --systems="$systems"
