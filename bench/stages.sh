# Sourced by results.sh and ldlm.sh: each corpus's rows and its judge, and how a stage and two seeds of stages are run. $1 is the corpus, $2 the path of the
# books, $3 the folder of what is trained. The judge has a vocabulary of its own, always the same, so that nats a token compare whatever vocabulary the models have.
corpus=$1 text=$1 trunk="" judge="--n_layer=6 --n_head=4 --n_embd=256 --max_steps=1000"
case $corpus in
    names) vocabulary="--vocab_size=4096" ruler="--vocab_size=2048" rows="--n_head=4 --n_embd=192" ;;
    docs) vocabulary="--vocab_size=2048" ruler="--vocab_size=512" rows="--batch_size=96 --block_size=32 --n_head=4 --n_embd=192" judge+=" --batch_size=64 --block_size=64" ;;
    books) text="${2:?the path of the books}" vocabulary="--encoding=bpe --vocab_size=4096" ruler=$vocabulary
           rows="--block_size=128 --batch_size=256 --n_head=8 --n_embd=512" trunk="--n_layer=8"
           judge="--n_layer=8 --n_embd=512 --max_steps=4000 --block_size=128 --batch_size=256 --n_head=8" ;;
    *) echo "error: names, docs or books" >&2; exit 2 ;;
esac
data=data/$corpus out=$3 evaluator=out/$corpus/evaluator
[ -f $data/train.bin ] || python data/prepare.py $text $vocabulary --out=$data
[ -f $data/judge/train.bin ] || python data/prepare.py $text $ruler --out=$data/judge

once() {  # once FOLDER SCRIPT OPTIONS...: unless it was done before. FOLDER/SCRIPT.done has its seconds
    local folder=$1 script=$2 start=$SECONDS; shift 2
    [ -f $folder/$(basename $script).done ] && return
    python $script --data=$data --out=$folder "$@"
    echo $((SECONDS - start)) > $folder/$(basename $script).done
}
both_seeds() {  # calls `seed 1` and `seed 2`
    mkdir -p $out
    once $evaluator bench/train_gpt.py --seed=1234 $judge --data=$data/judge
    if python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
        for s in 1 2; do seed $s; done
    else  # two runs of half the cores each are done sooner than two of all of them, one after the other
        export OMP_NUM_THREADS=$((($(nproc) + 1) / 2))
        for s in 1 2; do seed $s > $out/seed$s.log 2>&1 & pids[s]=$!; done
        echo "two seeds are being trained: tail -f $out/seed1.log"
        wait ${pids[1]} && wait ${pids[2]} || { echo "error: a stage failed, see $out/seed1.log and $out/seed2.log" >&2; exit 1; }
        unset OMP_NUM_THREADS
    fi
}
