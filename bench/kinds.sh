#!/usr/bin/env bash
# All kinds of model beside each other, each trained for some minutes and sampled as sample.py does by
# default. A change to what they share, such as guidance, is to be judged for all of them.
#
#     bash bench/kinds.sh                 # docs
#     bash bench/kinds.sh input.txt       # a text of one's own
#     SEED=2 bash bench/kinds.sh
#
# Prints the report of bench/evaluate.py, and fails if a system repeats words ("thou thou thou") much
# more often than real text. A stage that is done is not done again. An hour of one core.
set -euo pipefail
cd "$(dirname "$0")/.."
text=${1:-docs}
seed=${SEED:-1}
name=$(basename "$text")
data=data/kinds_${name%%.*}
out=out/kinds_${name%%.*}_$seed
options="--data=$data --batch_size=96 --block_size=32 --seed=$seed"
if [ ! -f $data/train.bin ]; then
    python data/prepare.py "$text" --vocab_size=2048 --out=$data
fi

# once FOLDER SCRIPT OPTIONS... trains a stage, unless it is done.
once() {
    local folder=$out/$1 script=$2
    shift 2
    mkdir -p $folder
    if [ ! -f "$folder/${script//[\/ ]/_}.done" ]; then
        python $script $options --out=$folder --overwrite "$@"
        touch "$folder/${script//[\/ ]/_}.done"
    fi
}
gpt=--teacher=$out/gpt/gpt.pt
once judge baselines/gpt.py --seed=1234 --n_layer=6 --max_steps=600
once gpt baselines/gpt.py --max_steps=400
once textldm train_vae.py $gpt --max_steps=300
once textldm train_dit.py --max_steps=600
once cola "variants/cola_dlm.py vae" $gpt --max_steps=300
once cola "variants/cola_dlm.py dit" --max_steps=600
once ldlm variants/ldlm.py $gpt --max_steps=800
once masked baselines/masked.py --max_steps=600

systems="real,GPT=gpt:$out/gpt/gpt.pt,TextLDM=textldm:$out/textldm,Cola DLM=textldm:$out/cola"
systems+=",LDLM=textldm:$out/ldlm,masked diffusion=masked:$out/masked/masked.pt"
python bench/evaluate.py --data=$data --out=$out --evaluator=$out/judge/gpt.pt --n=200 \
    --systems="$systems" --steps=20 --cfg=3 --temperature=0.7,1 --top_p=1
python - $out/eval.json << 'EOF'
import json
import sys

systems = json.load(open(sys.argv[1]))["systems"]
real = systems["real"]["repeated"]
bad = [name for name, row in systems.items() if row["repeated"] > real + 10]
for name, row in systems.items():
    print(f"{name}: {row['repeated']:.1f}% of words repeat the word before")
sys.exit(f"error: collapsed: {', '.join(bad)}" if bad else 0)
EOF
