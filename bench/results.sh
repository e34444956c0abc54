#!/usr/bin/env bash
# The tables of bench/RESULTS.md for one corpus: trains what is missing, two seeds side by side, with and without REPA and
# the autoregressive baselines at equal tokens and equal seconds, and judges all of it in one run.
#
#     bash bench/results.sh names        # then: cat out/names/eval.md
#     bash bench/results.sh docs
set -euo pipefail
cd "$(dirname "$0")/.."
corpus=${1:-names}
case $corpus in
    names) prepare="" rows="" dit="" steps=3400 n=1000 ;;  # steps: of GPT, VAE and DiT together
    docs) prepare="--vocab_size=512" rows="--batch_size=64 --block_size=40" n=600 steps=2500
          dit="--near --infill=0.8 --max_steps=1500" ;;
    *) echo "error: names or docs" >&2; exit 2 ;;
esac
data=data/$corpus out=out/$corpus
[ -f $data/train.bin ] || python data/prepare.py $corpus --out=$data $prepare

once() {  # once FOLDER SCRIPT OPTIONS...: unless it was done before. FOLDER/SCRIPT.done has its seconds
    local folder=$1 script=$2 start=$SECONDS; shift 2
    [ -f $folder/$(basename $script).done ] && return
    python $script --data=$data --out=$folder $rows "$@"
    echo $((SECONDS - start)) > $folder/$(basename $script).done
}
seed() {
    once $out/s$1 bench/train_gpt.py --seed=$1
    once $out/s$1 train_vae.py --seed=$1
    once $out/s$1 train_dit.py --seed=$1 $dit
    once $out/norepa$1 train_vae.py --seed=$1 --teacher=none
    once $out/norepa$1 train_dit.py --seed=$1 $dit
    once $out/tokens$1 bench/train_gpt.py --seed=$1 --max_steps=$steps
    # goes on for the steps that fit in the seconds that TextLDM took and the GPT has not
    local seconds=$(($(cat $out/s$1/*.done | paste -sd+))) own=$(cat $out/tokens$1/*.done)
    [ -d $out/seconds$1 ] || { cp -r $out/tokens$1 $out/seconds$1; rm $out/seconds$1/*.done; }
    once $out/seconds$1 bench/train_gpt.py --seed=$1 --max_steps=$((steps * seconds / own)) --resume
}
once $out/evaluator bench/train_gpt.py --seed=1234 --n_layer=6 --n_embd=256 --max_steps=1000
# two runs of half the cores each are done sooner than two of all of them, one after the other
export OMP_NUM_THREADS=$((($(nproc) + 1) / 2))
for s in 1 2; do seed $s > $out/seed$s.log 2>&1 & pids[s]=$!; done
echo "two seeds are being trained: tail -f $out/seed1.log"
wait ${pids[1]} && wait ${pids[2]} || { echo "error: a stage failed, see $out/seed1.log and $out/seed2.log" >&2; exit 1; }
unset OMP_NUM_THREADS

systems=real,other,unigram,tokens,prompt
for s in 1 2; do
    systems+=",gpt $s=gpt:$out/s$s/gpt.pt,gpt tokens $s=gpt:$out/tokens$s/gpt.pt,gpt seconds $s=gpt:$out/seconds$s/gpt.pt"
    systems+=",textldm $s=textldm:$out/s$s,no repa $s=textldm:$out/norepa$s"
done
python bench/evaluate.py --data=$data --out=$out --n=$n --cfg=1,2,3 --temperature=0.5,0.7,1 --steps=50 --systems="$systems"
