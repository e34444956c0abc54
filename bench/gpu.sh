#!/usr/bin/env bash
# What a GPU has to tell: the quality of networks of some 30M parameters on books, speed, and what
# --compile saves. Each call takes at most nine minutes.
#
#     bash bench/gpu.sh prepare FILE_OR_FOLDER [VAL]   # books as GPT-2's tokens; needs no GPU
#     bash bench/gpu.sh train                          # seven networks, in one or two calls
#     bash bench/gpu.sh judge                          # one table of what they write
#     bash bench/gpu.sh speed                          # each preset, and sampling, in one or two
#     bash bench/gpu.sh compile                        # steps with and without --compile
#     DRY=1 bash bench/gpu.sh STAGE                    # tiny networks and few steps, on a CPU
#
# A stage stops itself after LIMIT seconds (500). Its exit code is 3 then, and the same call goes on
# with what is left. SIGTERM and Ctrl-C stop it, too. Nothing that is done is done again: remove
# out/gpu to begin anew, and data/gpu for other books. All stages need data/gpu, and train and judge
# need out/gpu of the call before. The results are the few small files in out/gpu/report.
#
# Other settings are variables, too. They must not change between calls:
#     STEPS=1000       training steps, of 128 rows of up to 256 tokens; VAEs have half as many
#     NANOGPT=FOLDER   has nanoGPT's model.py, which `speed` then measures beside ours
#
# Parameters: GPT and judge 30M, VAEs 46M, DiTs 36M, masked diffusion 49M. The blocks have 11M (VAEs
# 7M, DiTs 16M). The rest is embeddings of 50,257 tokens: one matrix in the GPT, which ties it, and
# in the DiTs, two in the others. By our count training takes some 30 GB of the GPU's memory, and
# `speed` and `compile` take 50. No GPU has run this.
set -euo pipefail
cd "$(dirname "$0")/.."
stage=${1:-}
limit=${LIMIT:-500}
nanogpt=${NANOGPT:-}
name=gpu
device=""
rows="--block_size=256 --batch_size=128"
size="--n_head=6 --n_embd=384"
trunk="--n_layer=6"
steps=${STEPS:-1000}
every=$((steps / 2))
texts="--n=300 --steps=20 --temperature=0.7,0.85,1"
timing="--rounds=3 --steps=3 --accumulate=8"
tokens=1024
presets="tiny small medium large"
preset=small
if [ -n "${DRY:-}" ]; then
    name=gpu_dry
    device=--device=cpu
    # Evaluations hold the logits of 256 rows, so rows are short.
    rows="--block_size=8 --batch_size=4"
    size="--n_head=2 --n_embd=16"
    trunk="--n_layer=1"
    steps=${STEPS:-6}
    every=$steps
    texts="--n=16 --steps=2 --temperature=1"
    timing="--rounds=1 --steps=1 --accumulate=2 --block_size=2 --batch_size=4 $size $trunk"
    tokens=8
    preset=tiny
    presets="small large"
fi
data=data/$name
out=out/$name
report=$out/report
# The folder of the corpus has GPT-2's BPE, so the stages need no network.
vocabulary=${TIKTOKEN_CACHE_DIR:-}
export TIKTOKEN_CACHE_DIR=$PWD/$data/tiktoken
# Whole results come from judging and timing. They start with so many seconds left, or first.
least=200

fail() {
    echo "error: $1" >&2
    exit 2
}

not_done() {
    echo "$stage: stopped after $SECONDS seconds; the same call goes on with what is left"
    exit 3
}

# Some machines have only the longer name.
python=python
if ! command -v python > /dev/null; then
    python=python3
fi

child=""
stopped=""
stop() {
    stopped=yes
    if [ -n "$child" ]; then
        kill -TERM $child 2> /dev/null || true
    fi
}
trap stop TERM INT HUP

# run LOG COMMAND...
# Runs a command, whose output goes to LOG, too. Ends this script when the time is over, and after a
# signal, which the command gets as SIGTERM: training scripts save then.
run() {
    local log=$1 code=0 left=$((limit - SECONDS))
    shift
    if [ -n "$stopped" ] || [ $left -le 0 ]; then
        not_done
    fi
    echo "== $*" | tee -a "$log"
    timeout --foreground --kill-after=30 $left "$@" > >(tee -a "$log") &
    child=$!
    wait $child || code=$?
    # A signal ends `wait`, but not the command.
    while kill -0 $child 2> /dev/null; do
        code=0
        wait $child || code=$?
    done
    child=""
    if [ -n "$stopped" ] || [ $code = 124 ]; then
        not_done
    fi
    if [ $code != 0 ]; then
        exit $code
    fi
}

# train FOLDER CHECKPOINT SCRIPT OPTIONS...
# Runs a training script, or goes on with it. SCRIPT may have a first argument.
train() {
    local folder=$out/$1 checkpoint=$2 script=$3 resume="" start=$SECONDS
    shift 3
    local mark=$folder/$checkpoint.done
    if [ -f $mark ]; then
        return
    fi
    mkdir -p $folder
    if [ -f $folder/${checkpoint}_last.pt ]; then
        resume=--resume
    fi
    run $report/train.log $python $script --data=$data --out=$folder $rows $size $device $resume \
        "$@"
    echo "$folder/$checkpoint.pt: $((SECONDS - start)) seconds in this call" |
        tee -a $report/train.log
    touch $mark
}

train_all() {
    # Evaluations and checkpoints are few, because they take time.
    local half="--max_steps=$((steps / 2)) --eval_interval=$every"
    local whole="--max_steps=$steps --eval_interval=$every"
    local vae="--n_layer=2 --learning_rate=1e-3"
    local teacher=$out/textldm/gpt.pt
    train evaluator gpt baselines/gpt.py $trunk $whole --seed=1234
    train textldm gpt baselines/gpt.py $trunk $whole
    train textldm vae train_vae.py $vae $half
    train textldm dit train_dit.py $trunk $whole
    train blocks vae "variants/cola_dlm.py vae" $vae $half --teacher=$teacher
    train blocks dit "variants/cola_dlm.py dit" $trunk $whole --latent_block=4
    train masked masked baselines/masked.py $trunk $whole
}

# once RESULT COMMAND...
# Runs a command that writes the file RESULT when it is done.
once() {
    local result=$1
    shift
    if [ -f $result ]; then
        return
    fi
    if [ $SECONDS -gt 20 ] && [ $((limit - SECONDS)) -lt $least ]; then
        not_done
    fi
    mkdir -p $(dirname $result)
    run $report/$stage.log "$@"
}

# speed NAME OPTIONS...: a run of bench/speed.py.
speed() {
    local result=$out/$stage/$1.json
    shift
    once $result $python bench/speed.py --data=$data --out=$result $device "$@"
}

judge_all() {
    local systems="real,other,unigram,GPT=gpt:$out/textldm/gpt.pt,TextLDM=textldm:$out/textldm"
    systems+=",blocks of 4=textldm:$out/blocks,masked diffusion=masked:$out/masked/masked.pt"
    # 64 texts at once: all logits of their rows are in memory.
    once $report/eval.md $python bench/evaluate.py --data=$data --out=$report $device $texts \
        --cfg=3 --top_p=1 --batch_size=64 --evaluator=$out/evaluator/gpt.pt --systems="$systems"
}

# One network at a time is in memory. The VAE is the same in all presets but tiny.
speed_all() {
    local p stages more
    for p in $presets; do
        stages=gpt,vae,dit
        more=""
        case $p in
            small)
                stages="$stages,gpt with AdamW"
                more=${nanogpt:+--nanogpt=$nanogpt}
                ;;
            medium) stages=gpt,dit ;;
            large)
                stages=gpt,dit
                # As many tokens in a step, in less memory. Of two equal options the last counts.
                more="--batch_size=8 --accumulate=16"
                ;;
        esac
        speed $p --parts=train --preset=$p --stages="$stages" --no-turns $timing $more
    done
    speed sampling --parts=sample --preset=$preset --lengths=$tokens --batches=1 --rounds=1
    if [ -z "$nanogpt" ]; then
        echo "speed: without NANOGPT, the GPT with AdamW of preset small stands for nanoGPT's 124M"
    fi
}

# A stage with --compile takes turns with the same one without.
compile_all() {
    local s
    for s in gpt vae dit; do
        speed $s --parts=train --preset=small --stages="$s,$s compiled" $timing
    done
}

case $stage in
    prepare)
        books=${2:-}
        if [ -z "$books" ] || [ ! -e "$books" ]; then
            fail "name a file or a folder of books: bash bench/gpu.sh prepare FILE_OR_FOLDER"
        fi
        val=${3:+--val=$3}
        mkdir -p $report $data/tiktoken
        if [ -n "$vocabulary" ]; then
            cp -f "$vocabulary"/* $data/tiktoken/
        fi
        once $data/train.bin $python data/prepare.py "$books" --out=$data --encoding=gpt2 \
            --layout=stream "${val:---val_fraction=0.05}"
        ;;
    train | judge | speed | compile)
        if [ ! -f $data/train.bin ]; then
            fail "there are no books in $data; bash bench/gpu.sh prepare FILE_OR_FOLDER makes them"
        fi
        if [ -z "$device" ]; then
            found=$($python -c "import torch; print(torch.cuda.is_available())")
            if [ "$found" != True ]; then
                fail "there is no GPU here; DRY=1 bash bench/gpu.sh $stage tries it on a CPU"
            fi
        fi
        if [ $stage = judge ] && [ ! -f $out/masked/masked.done ]; then
            fail "not all networks are trained; bash bench/gpu.sh train comes first"
        fi
        mkdir -p $report
        ${stage}_all
        ;;
    *) fail "name a stage: prepare, train, judge, speed or compile" ;;
esac
echo "$stage: done; $report has the results"
