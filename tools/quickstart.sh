#!/usr/bin/env bash
# The main job from one end to the other on CPU ranks: text, tokens, pretraining on 2 ranks, plot, sample, Hugging Face.
# With `bert` it trains an encoder that fills gaps instead of a decoder, with `t5` an encoder-decoder that tells hidden
# spans. Run it again and it goes on where it was; delete runs/quickstart (or runs/quickstart-bert, -t5) to train anew.
set -euo pipefail
case ${1:-} in
    "") name=quickstart tokenizer=bpe ;;
    bert) name=quickstart-bert tokenizer=wordpiece ;;
    t5) name=quickstart-t5 tokenizer=t5 ;;
    *) echo "quickstart.sh: '$1' is none of its models; give bert or t5, or nothing for a decoder" >&2; exit 2 ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

data=data/$name config=configs/$name.yaml run=runs/$name
say() { printf '\n== %s\n' "$*"; }

# What is made gets its name when it is whole: a start that was interrupted must not leave a part for the next.
say "1. text: the Python standard library's own source files"
[[ -f $data/valid.jsonl ]] || {
    python tools/quickstart_corpus.py "$data/text.part"
    mv "$data"/text.part/{train,valid}.jsonl "$data"
    rmdir "$data/text.part"
}

say "2. tokenizer"
[[ -d $data/tokenizer ]] || {
    rm -rf "$data/tokenizer.part"
    python tools/train_tokenizer.py --input "$data/train.jsonl" --output "$data/tokenizer.part" --vocab-size 4096 \
        --type $tokenizer
    mv "$data/tokenizer.part" "$data/tokenizer"
}

say "3. tokens"
for split in train valid; do
    [[ -f $data/${split}_text_document.idx ]] || python tools/preprocess_data.py --append-eod \
        --input "$data/$split.jsonl" --output-prefix "$data/$split" --tokenizer "$data/tokenizer"
done

export RANKS=2 CUDA_VISIBLE_DEVICES= # two CPU ranks, whatever else this machine has
say "4. pretraining: 2 ranks share every matrix (tensor 2) ..."
bash slurm/pretrain.sh $config parallel.tensor=2 train.stop_at=200
say "   ... and go on from the checkpoint as 2 data-parallel ranks (data 2)"
bash slurm/pretrain.sh $config parallel.tensor=1 train.micro_batch_size=4
python tools/quickstart_report.py $run

say "5. a sample"
case $name in
    quickstart-bert) python -m megalite fill $run "def read([MASK], size):" "for line [MASK] lines:" "[MASK] os" ;;
    quickstart-t5)
        python -m megalite generate $run --prompt "    def read(<extra_id_0>, size):
        <extra_id_1> None" --max-tokens 12 ;;
    *) python -m megalite generate $run --prompt "def read(self, size):" --max-tokens 96 --temperature 0.6 ;;
esac

say "6. the checkpoint is a Hugging Face model"
python tools/check_hf.py $run
