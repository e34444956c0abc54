#!/usr/bin/env bash
# The tables of bench/RESULTS.md for one corpus: trains what is missing, two seeds side by side (on a GPU one after the other), with
# and without REPA, in the paper's form, and the baselines: the autoregressive one, short (the teacher) and long, and (of books) masked
# diffusion. Then it judges all of it in one run. Stopped, it goes on with the first stage that was not done.
#
#     bash bench/results.sh names                    # then: cat out/names/eval.md
#     bash bench/results.sh docs
#     BLOCKS="4 8 16" bash bench/results.sh docs  # and Cola DLM's blocks, of as many latents
#     bash bench/results.sh books FILE_OR_FOLDER     # OpenWebText2's format; wants a GPU, where each stage fits in ten minutes
set -euo pipefail
cd "$(dirname "$0")/.."
corpus=${1:-names} blocks=${BLOCKS:-} temperatures=0.5,0.7,1 masked=""
. bench/stages.sh "$corpus" "${2:-}" out/$corpus
case $corpus in
    names) vae_steps=1000 dit_steps=2400 gpt_steps=1500 n=1000 ;;
    docs) vae_steps=500 dit_steps=4000 gpt_steps=3000 n=600 temperatures=0.7,0.8,1 ;;
    books) vae_steps=1000 dit_steps=6000 gpt_steps=7500 n=1000 masked=yes ;;
esac

seed() {
    local vae="$rows --seed=$1 --max_steps=$vae_steps --learning_rate=1e-3" net="$rows $trunk --seed=$1"
    once $out/s$1 bench/train_gpt.py $net --max_steps=500
    once $out/s$1 train_vae.py $vae
    once $out/s$1 train_dit.py $net --max_steps=$dit_steps
    once $out/norepa$1 train_vae.py $vae --teacher=none
    once $out/norepa$1 train_dit.py $net --max_steps=$dit_steps
    # on names the longest that pays: more steps, up to the tokens of the three stages, only overfit (RESULTS.md); elsewhere as many tokens as those
    once $out/long$1 bench/train_gpt.py $net --max_steps=$gpt_steps
    once $out/paper$1 train_vae.py $vae --teacher=$out/s$1/gpt.pt --recipe=paper
    once $out/paper$1 train_dit.py $net --max_steps=$dit_steps --recipe=paper
    [ -z "$masked" ] || once $out/masked$1 bench/train_masked.py $net --max_steps=$dit_steps
    [ -z "$blocks" ] || once $out/causal$1 train_vae.py $vae --causal --teacher=$out/s$1/gpt.pt
    for b in $blocks; do
        once $out/blocks$b-$1 train_dit.py $net --max_steps=$dit_steps --latent_block=$b --vae=$out/causal$1/vae.pt
        ln -sf ../causal$1/vae.pt $out/blocks$b-$1/vae.pt
    done
}
both_seeds

systems=real,other,unigram,tokens,prompt
for s in 1 2; do
    systems+=",gpt $s=gpt:$out/s$s/gpt.pt,gpt long $s=gpt:$out/long$s/gpt.pt"
    systems+=",textldm $s=textldm:$out/s$s,no repa $s=textldm:$out/norepa$s,paper $s=textldm:$out/paper$s"
    [ -z "$masked" ] || systems+=",masked $s=masked:$out/masked$s/masked.pt"
    for b in $blocks; do systems+=",blocks of $b $s=textldm:$out/blocks$b-$s"; done
done
judge() { python bench/evaluate.py --data=$data --n=$n --steps=20 --evaluator=$evaluator/gpt.pt "$@"; }
judge --out=$out --cfg=3 --temperature=$temperatures --systems="$systems"
[ $corpus != names ] || judge --out=$out/unprompted --unprompted --cfg=1 --temperature=$temperatures --systems="${systems/,prompt/}"
