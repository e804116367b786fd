#!/bin/bash
# The tables of docs/evidence.md again, from nothing, into runs/evidence (of all methods: runs/campaigns); those of the docs stay
# in bench/results.
#   bash bench/evidence.sh    # some sixteen hours on two cores; what is done is kept, and the same command goes on
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
out=runs/evidence of_bed="--samples 4 --continuations 32"

keys() {  # of a bed under another name than its world's
    echo "model.path=data/beds/$1/model data.train=data/beds/$1/train.jsonl data.validation=data/beds/$1/held_out.jsonl"
}

make_bed() {  # NAME WORLD [knobs]
    [ -f "data/beds/$1/bed.json" ] || python -m aipo.beds "$2" --name "$1" "${@:3}"
}

train() {  # bench/beds.py, which keeps what is done
    python bench/beds.py "$@" --out "$out"
}

make_bed chain chain
make_bed fork fork
make_bed copy copy
make_bed chain-fixed chain --fixed 1
make_bed chain-half chain --fixed 0.5
make_bed fork-fixed fork --fixed 1
make_bed fork-half fork --fixed 0.5
make_bed chain-wide chain --width 128

# what signals find at the base policy, and where the gradient on them points
python -m aipo.problems.embedded
python -m aipo.credit --config smollm2_135m.yaml --out "$out/credit-smollm2-135m"
for bed in chain chain-fixed chain-half fork fork-fixed fork-half; do
    python -m aipo.credit --config "beds/${bed%-*}.yaml" $of_bed --out "$out/credit-$bed" $(keys "$bed")
done
for seed in 1 2 3; do  # other draws of everything
    python -m aipo.credit --config beds/fork.yaml $of_bed --out "$out/credit-fork-fixed-seed$seed" \
        $(keys fork-fixed) "seed=$seed"
done
mi="mi coordinate quadrature answer,mi coordinate random answer,mi coordinate random cca answer"
mi="$mi,mi coordinate random question_answer,mi pointwise random answer,mi position random answer"
wrong=$(echo "$mi" | sed 's/,/ (wrong gold),/g; s/$/ (wrong gold)/')
plain="critical,filler,surprisal,entropy,certainty,energy,gap,information,attention,position (early),random"
for bed in chain fork; do
    python -m aipo.credit.gradients --config "beds/$bed.yaml" --times 64 --signals "$plain,$mi,$wrong" \
        --out "$out/gradients-$bed"
done

# training on what a signal selects
for bed in fork chain copy; do
    train "$bed"
done
others=oracle,all,random,inverse,fillers,mi_position,mi_position_wrong_gold,surprisal,entropy,entropy_low,information
scores=mi,mi_wrong_gold,mi_low,mi_low_wrong_gold  # their bandwidth is near the median of the bed
more=$scores,mi_cca,mi_cca_wrong_gold,mi_random,mi_random_wrong_gold
selections() {  # NAME WORLD SIGMA SCORES keys
    train "$2" --name "$1" --conditions "$others" $(keys "$1") "${@:5}"
    train "$2" --name "$1" --conditions "$4" $(keys "$1") "${@:5}" "mi.sigma=$3"
}
selections chain-fixed chain 5.4 "$more" optim.lr=2e-4
selections chain-half chain 7.6 "$more" optim.lr=2e-4 optim.steps=20
selections fork-half fork 7.9 "$scores" optim.lr=2e-4
train chain --name chain-wide --conditions oracle,all,random,inverse $(keys chain-wide) optim.lr=3e-4
train chain --name chain-wide --conditions "$scores" $(keys chain-wide) optim.lr=3e-4 mi.sigma=24
python sweep.py laptop/table1_beds.yaml --workers 2
python sweep.py laptop/table1_fork.yaml --workers 2
python sweep.py laptop/table1_chain.yaml --workers 2
python sweep.py laptop/table1_copy.yaml --workers 2
