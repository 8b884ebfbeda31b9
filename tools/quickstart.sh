#!/usr/bin/env bash
# The main job from one end to the other on CPU ranks: text, tokens, pretraining on 2 ranks, plot, sample, Hugging Face.
# Sets itself up, then does what `megalite quickstart` does: with `bert` it trains an encoder that fills gaps instead of
# a decoder, with `t5` an encoder-decoder that tells hidden spans, with `finetune` it goes on from a base model to a chat.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec python -m megalite quickstart "$@"
