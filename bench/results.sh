#!/usr/bin/env bash
# The main tables of docs/results.md for one corpus. Trains all systems with two seeds, and judges
# them in one run.
#
#     bash bench/results.sh names                    # then: cat out/names/eval.md
#     bash bench/results.sh docs
#     BLOCKS="4 8 16" bash bench/results.sh docs     # and Cola DLM with blocks of so many latents
#     bash bench/results.sh books FILE_OR_FOLDER     # in OpenWebText2's format
#
# The systems are TextLDM, TextLDM without REPA, TextLDM with the paper's settings, a GPT with few
# steps (the teacher), a GPT with many steps, and for books masked diffusion. On a CPU the two seeds
# run side by side, on a GPU one after the other. books needs a GPU, where a stage takes up to ten
# minutes. Stages that are done are not run again, so the script can be stopped and started again.
set -euo pipefail
cd "$(dirname "$0")/.."
corpus=${1:-names}
blocks=${BLOCKS:-}
temperatures=0.5,0.7,1
masked=""
. bench/stages.sh "$corpus" "${2:-}" out/$corpus
# gpt_steps are of the GPT with many steps. On docs and books it sees as many tokens as the three
# stages of TextLDM. On names so many only overfit (docs/results.md), and it sees as many as pay.
case $corpus in
    names)
        vae_steps=1000
        dit_steps=2400
        gpt_steps=1500
        n=1000
        ;;
    docs)
        vae_steps=500
        dit_steps=4000
        gpt_steps=3000
        n=600
        temperatures=0.7,0.8,1
        ;;
    books)
        vae_steps=1000
        dit_steps=6000
        gpt_steps=7500
        n=1000
        masked=yes
        ;;
esac

# seed SEED: trains all systems.
seed() {
    local s=$1
    local teacher=$out/s$s/gpt.pt
    local vae="$rows --seed=$s --max_steps=$vae_steps --learning_rate=1e-3"
    local net="$rows $trunk --seed=$s"
    local dit="$net --max_steps=$dit_steps"
    once $out/s$s baselines/gpt.py $net --max_steps=500
    once $out/s$s train_vae.py $vae
    once $out/s$s train_dit.py $dit
    once $out/norepa$s train_vae.py $vae --teacher=none
    once $out/norepa$s train_dit.py $dit
    once $out/long$s baselines/gpt.py $net --max_steps=$gpt_steps
    once $out/paper$s train_vae.py $vae --teacher=$teacher --recipe=paper
    once $out/paper$s train_dit.py $dit --recipe=paper
    if [ -n "$masked" ]; then
        once $out/masked$s baselines/masked.py $dit
    fi
    if [ -n "$blocks" ]; then
        once $out/causal$s "variants/cola_dlm.py vae" $vae --teacher=$teacher
    fi
    for b in $blocks; do
        once $out/blocks$b-$s "variants/cola_dlm.py dit" $dit --latent_block=$b \
            --vae=$out/causal$s/vae.pt
        ln -sf ../causal$s/vae.pt $out/blocks$b-$s/vae.pt
    done
}
both_seeds

# Rows of the table, as LABEL=KIND:PATH. A label has no "=", ":" or ",", and ends with the seed.
systems=real,unigram
for s in 1 2; do
    systems+=",GPT $s=gpt:$out/s$s/gpt.pt"
    systems+=",GPT with more steps $s=gpt:$out/long$s/gpt.pt"
    systems+=",TextLDM $s=textldm:$out/s$s"
    systems+=",TextLDM without REPA $s=textldm:$out/norepa$s"
    systems+=",TextLDM with the paper's settings $s=textldm:$out/paper$s"
    if [ -n "$masked" ]; then
        systems+=",masked diffusion $s=masked:$out/masked$s/masked.pt"
    fi
    for b in $blocks; do
        systems+=",blocks of $b $s=textldm:$out/blocks$b-$s"
    done
done

judge() {
    python bench/evaluate.py --data=$data --n=$n --steps=20 --evaluator=$evaluator/gpt.pt \
        --temperature=$temperatures "$@"
}
judge --out=$out --cfg=3 --systems="$systems"
if [ $corpus = names ]; then
    # Whole names, from empty prompts.
    judge --out=$out/unprompted --unprompted --cfg=1 --systems="$systems"
fi
