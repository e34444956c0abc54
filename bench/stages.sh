# results.sh and ldlm.sh source this file. It has the sizes of each corpus and of its judge, and it
# runs stages of training, with two seeds.
#
#     . bench/stages.sh CORPUS BOOKS OUT
#
# CORPUS is names, docs or books. BOOKS is the path of the books. OUT is the folder of the models.
corpus=$1
text=$1
data=data/$corpus
out=$3
evaluator=out/$corpus/evaluator
trunk=""
judge="--n_layer=6 --n_head=4 --n_embd=256 --max_steps=1000"
case $corpus in
    names)
        vocabulary="--vocab_size=4096"
        judge_vocabulary="--vocab_size=2048"
        rows="--n_head=4 --n_embd=192"
        ;;
    docs)
        vocabulary="--vocab_size=2048"
        judge_vocabulary="--vocab_size=512"
        rows="--batch_size=96 --block_size=32 --n_head=4 --n_embd=192"
        judge="$judge --batch_size=64 --block_size=64"
        ;;
    books)
        text=${2:?the path of the books}
        vocabulary="--encoding=bpe --vocab_size=4096"
        judge_vocabulary=$vocabulary
        rows="--block_size=128 --batch_size=256 --n_head=8 --n_embd=512"
        trunk="--n_layer=8"
        judge="--n_layer=8 --n_head=8 --n_embd=512 --max_steps=4000 --block_size=128"
        judge="$judge --batch_size=256"
        ;;
    *)
        echo "error: names, docs or books" >&2
        exit 2
        ;;
esac

# The judge has a vocabulary of its own. So nats per token compare, whatever the models' vocabulary.
if [ ! -f $data/train.bin ]; then
    python data/prepare.py "$text" $vocabulary --out=$data
fi
if [ ! -f $data/judge/train.bin ]; then
    python data/prepare.py "$text" $judge_vocabulary --out=$data/judge
fi

# once FOLDER SCRIPT OPTIONS...
# Runs a training script that writes to FOLDER, unless it was done before. SCRIPT may have a first
# argument. FOLDER/SCRIPT.done has the seconds that it took. What a stopped run left is replaced.
once() {
    local folder=$1 script=$2 start=$SECONDS
    local mark=$folder/$(basename "${script// /_}").done
    shift 2
    if [ -f $mark ]; then
        return
    fi
    python $script --data=$data --out=$folder --overwrite "$@"
    echo $((SECONDS - start)) > $mark
}

# Trains the judge, then calls `seed 1` and `seed 2`. The script that sources this file has `seed`.
both_seeds() {
    mkdir -p $out
    once $evaluator baselines/gpt.py --seed=1234 $judge --data=$data/judge
    if python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
        seed 1
        seed 2
        return
    fi
    # On a CPU two runs side by side, with half of the cores each, are done sooner than two runs one
    # after the other.
    export OMP_NUM_THREADS=$((($(nproc) + 1) / 2))
    local first second
    seed 1 > $out/seed1.log 2>&1 &
    first=$!
    seed 2 > $out/seed2.log 2>&1 &
    second=$!
    echo "two seeds are being trained: tail -f $out/seed1.log"
    if ! wait $first || ! wait $second; then
        echo "error: a stage failed, see $out/seed1.log and $out/seed2.log" >&2
        exit 1
    fi
    unset OMP_NUM_THREADS
}
