#!/bin/bash
#SBATCH --job-name=megalite-finetune
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=8:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#
# Finetuning: a run that begins with the weights of another (model.hf, or checkpoint.resume, in CONFIG). It trains just
# as pretraining does, on other resources; pretrain.sh, which does the work, says how it is called and what can be set.
# configs/finetune-chat.yaml, -dpo.yaml and -classes.yaml are to start from, and say how rows become token files.
#
#   sbatch slurm/finetune.sh CONFIG [key=value ...]
#   bash   slurm/finetune.sh CONFIG [key=value ...]
root=$(dirname "${BASH_SOURCE[0]}")/..
if [[ ! -f $root/slurm/pretrain.sh ]]; then root=$SLURM_SUBMIT_DIR; fi # sbatch runs a copy from its spool folder
exec bash "$root/slurm/pretrain.sh" "$@"
