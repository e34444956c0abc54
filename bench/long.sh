#!/usr/bin/env bash
# What TextLDM learns in 100 epochs of names, where a GPT is best after a dozen. Trains two DiTs of
# the README's size for 13,000 steps each, keeps copies on the way, and judges the copies beside
# GPTs: after prompts, and whole names from nothing.
#
#     bash bench/long.sh       # two seeds side by side: about 40 minutes of two cores, then 30
#     python bench/plots.py --evaluation=out/long/eval.json --pictures=bench/pictures
#
# Stages that are done are not run again.
set -euo pipefail
cd "$(dirname "$0")/.."
. bench/stages.sh names "" out/long
steps="500 2000 4000 8000 13000"

# copies FOLDER: copies FOLDER/dit.pt to FOLDER/at_STEP each time that training writes it.
copies() {
    local s last=0
    while true; do
        sleep 5
        s=$(python -c "import torch; print(torch.load('$1/dit.pt')['step'])" 2> /dev/null) || continue
        if [ $s != $last ]; then
            mkdir -p $1/at_$s
            cp $1/dit.pt $1/at_$s/dit.pt
            ln -sf ../../s1/vae.pt $1/at_$s/vae.pt
            last=$s
        fi
    done
}

# seed SEED: trains a teacher, a GPT with as many steps as pay, and a DiT. Sizes are the defaults,
# which are the README's.
seed() {
    local s=$1
    once $out/s$s baselines/gpt.py --seed=$s --max_steps=400
    once $out/gpt$s baselines/gpt.py --seed=$s --max_steps=1500
    if [ $s = 1 ]; then
        once $out/s1 train_vae.py
    fi
    while [ ! -f $out/s1/train_vae.py.done ]; do # both DiTs read the latents of one VAE
        sleep 5
    done
    copies $out/s$s &
    once $out/s$s train_dit.py --seed=$s --max_steps=13000 --eval_interval=500 \
        --vae=$out/s1/vae.pt
    sleep 10
    kill $!
}
both_seeds

systems=real
for s in 1 2; do
    systems+=",GPT $s=gpt:$out/s$s/gpt.pt,GPT with more steps $s=gpt:$out/gpt$s/gpt.pt"
    for n in $steps; do
        systems+=",$n steps $s=textldm:$out/s$s/at_$n"
    done
done
judge() {
    python bench/evaluate.py --data=$data --n=1000 --steps=20 --cfg=3 --top_p=1 \
        --evaluator=$evaluator/gpt.pt --systems="$systems" "$@"
}
judge --out=$out --temperature=0.7,1,1.3
judge --out=$out/unprompted --unprompted --temperature=0.85,1 --keep=0,2,1
