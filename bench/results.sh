#!/usr/bin/env bash
# The tables of bench/RESULTS.md for one corpus: trains what is missing, two seeds, with and without REPA and
# the autoregressive baselines, and judges all of it in one run.
#
#     bash bench/results.sh names        # then: cat out/names/eval.md
#     bash bench/results.sh docs
set -euo pipefail
cd "$(dirname "$0")/.."
corpus=${1:-names}
case $corpus in
    names) prepare="" rows="" dit="" n=1000 ;;
    docs) prepare="--vocab_size=512" rows="--batch_size=64 --block_size=40" n=600
          dit="--near --infill=0.8 --token_loss=0.3 --max_steps=3000" ;;
    *) echo "error: names or docs" >&2; exit 2 ;;
esac
data=data/$corpus out=out/$corpus
[ -f $data/train.bin ] || python data/prepare.py $corpus --out=$data $prepare

once() {  # once FOLDER SCRIPT OPTIONS...: unless it was done before
    local folder=$1 script=$2; shift 2
    [ -f $folder/$(basename $script).done ] && return
    python $script --data=$data --out=$folder $rows "$@"
    touch $folder/$(basename $script).done
}
once $out/evaluator bench/train_gpt.py --seed=1234 --n_layer=6 --n_embd=256 --max_steps=1000
systems=real,other,unigram,prompt
for s in 1 2; do
    once $out/s$s bench/train_gpt.py --seed=$s
    once $out/s$s train_vae.py --seed=$s
    once $out/s$s train_dit.py --seed=$s $dit
    once $out/norepa$s train_vae.py --seed=$s --teacher=none
    once $out/norepa$s train_dit.py --seed=$s $dit
    # fewer steps than teacher, VAE and DiT have together (5,000 and 4,000): the comparison is not yet equal, in TextLDM's favour
    once $out/long$s bench/train_gpt.py --seed=$s --max_steps=2000
    systems+=",gpt $s=gpt:$out/s$s/gpt.pt,gpt long $s=gpt:$out/long$s/gpt.pt,textldm $s=textldm:$out/s$s,no repa $s=textldm:$out/norepa$s"
done
python bench/evaluate.py --data=$data --out=$out --n=$n --cfg=1,2,3,5 --steps=50 --systems="$systems"
