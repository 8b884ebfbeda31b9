"""Examples that `--help` shows, by verb. A test reads each of them as the command line does."""

EXAMPLES: dict[str, tuple[str, ...]] = {
    # Of the program itself, whose name has no verb behind it.
    "": (
        "megalite config new --preset llama-8m > my.yaml    # then: megalite train my.yaml",
        "megalite train configs/quickstart.yaml train.steps=100",
        "megalite generate runs/my --prompt 'Once upon a time'",
    ),
    "config": (
        "megalite config keys optimizer",
        "megalite config presets",
        "megalite config new --preset llama-8m --output my.yaml",
    ),
    "config keys": ("megalite config keys", "megalite config keys optimizer data.packing"),
    "config presets": ("megalite config presets",),
    "config schema": ("megalite config schema > config.schema.json",),
    "config new": (
        "megalite config new --preset llama-8m --name first --output configs/first.yaml",
    ),
    "corpus": (
        "megalite corpus configs/corpus/web.yaml",
        "megalite corpus configs/corpus/web.yaml workers=8 language.min_score=0.5",
    ),
    "tokenizer": (
        "megalite tokenizer train --input 'corpus/*.jsonl' --output data/tokenizer --vocab-size 32000",
    ),
    "tokenizer train": (
        "megalite tokenizer train --input 'corpus/*.jsonl' --output data/tokenizer --vocab-size 32000",
        "megalite tokenizer train --input code/ --output data/tokenizer --vocab-size 32000 --special-tokens fim chatml",
        "megalite tokenizer train --input texts/ --output data/tokenizer --vocab-size 30522 --type wordpiece",
    ),
    "preprocess": (
        "megalite preprocess --input 'corpus/*.jsonl' --output-prefix data/web --tokenizer data/tokenizer",
        "megalite preprocess --format chat --input chats.jsonl --output-prefix data/chats --tokenizer MODEL",
    ),
    "train": (
        "megalite train configs/quickstart.yaml train.steps=100",
        "megalite train my.yaml --set optimizer.lr=1e-3 --print-plan",
        "torchrun --nproc-per-node=8 -m megalite train my.yaml parallel.tensor=8",
        "sbatch --nodes=8 slurm/pretrain.sh my.yaml",
    ),
    "launch": (
        "megalite launch my.yaml train.steps=100",
        "megalite launch --hosts node1,node2 my.yaml",
        "megalite launch --hosts hosts.txt --ranks 8 my.yaml --dry-run",
    ),
    "quickstart": ("megalite quickstart", "megalite quickstart finetune --dir /tmp/first"),
    "finetune": (
        "megalite finetune MODEL --data chats.jsonl run.name=first",
        "megalite finetune MODEL --data chats.jsonl --method lora optimizer.lr=1e-4 train.epochs=2",
        "megalite finetune runs/first --data preferences.jsonl --output dpo.yaml",
    ),
    "sweep": (
        "megalite sweep lr.yaml",
        "megalite sweep lr.yaml trials=40",
        "megalite sweep my.yaml --find-lr 1e-5 1",
        "megalite sweep my.yaml model.mup.base_hidden=256 --coordinate-check 256 512 1024",
    ),
    "ladder": ("megalite ladder ladder.yaml", "megalite ladder ladder.yaml parallel=4"),
    "job": ("megalite job configs/quickstart.yaml --nodes 2 --ranks-per-node 8",),
    "preflight": (
        "srun --nodes=8 --ntasks-per-node=8 python -m megalite preflight my.yaml --interconnect ib-ndr",
    ),
    "plan": (
        "megalite plan configs/llama-8b.yaml --gpus 512 --gpu h200 --tokens 15T",
        "megalite plan configs/llama-8b.yaml --gpus 512 --gpu h200 --search --output best.yaml --picture step.png",
        "megalite plan my.yaml --gpus 64 --gpu h200 --precision --steps 1000",
    ),
    "dryrun": (
        "megalite dryrun configs/llama-8b.yaml --gpus 512 --gpu h200",
        "megalite dryrun configs/llama-8b.yaml parallel.elastic=true --gpus 64 --gpu h200 --restart-gpus 56,64",
    ),
    "generate": (
        "megalite generate runs/my --prompt 'Once upon a time' --max-tokens 64",
        "megalite generate runs/chat --chat --prompt 'Who are you?' --temperature 0",
        "megalite generate runs/my --prompt 'Once upon a time' --beams 4 --answers 2",
    ),
    "chat": ("megalite chat runs/chat", "megalite chat runs/chat --system 'Answer in one word.'"),
    "fill": ("megalite fill runs/bert 'The capital of France is [MASK].'",),
    "classify": (
        "megalite classify runs/ham 'You have won.' 'See you at noon.'",
        "megalite classify runs/ham --input texts.jsonl --json",
    ),
    "answer": (
        "megalite answer runs/squad --question 'Who wrote it?' --context 'It was written by Ada.'",
        "megalite answer runs/squad --input rows.jsonl --may-be-none",
    ),
    "annotate": (
        "megalite annotate runs/ham --input texts.jsonl --tool label-studio --output tasks.json --count 200",
        "megalite annotate runs/chat --chat --input prompts.txt --tool argilla --output records.json",
    ),
    "embed": (
        "megalite embed runs/bert 'a text' 'another'",
        "megalite embed runs/bert --input texts.jsonl --output vectors.npy",
    ),
    "eval": (
        "megalite eval runs/my",
        "megalite eval runs/my --tokens data/other_text_document",
        "megalite eval runs/my --tasks arc_easy,hellaswag --limit 200",
        "megalite eval runs/chat --data rows.jsonl --chat",
        "megalite eval runs/my --bias crows_pairs.csv BBQ/Age.jsonl --corpus-report data/web/report.json",
    ),
    "serve": (
        "megalite serve runs/chat",
        "megalite serve runs/base --also runs/chat",
        "megalite serve runs/chat --challenger runs/chat-2 --share 0.1 --request-log requests",
        "torchrun --nproc-per-node=4 -m megalite serve runs/big --tensor 4 --expert 2",
        "megalite serve runs/chat --host 0.0.0.0 --port 8080 --api-key-file keys.txt",
    ),
    "monitor": (
        "megalite monitor requests",
        "megalite monitor requests --compare --window 7d",
        "megalite monitor requests --window 1h --reference last-month --max-p95 5",
    ),
    "retrain": (
        "megalite retrain configs/retrain/chat.yaml",
        "megalite retrain my.yaml margin=0.01",
    ),
    "average": (
        "megalite average runs/my/checkpoints/step-00000800 runs/my/checkpoints/step-00001000 -o averaged",
    ),
    "quantize": (
        "megalite quantize runs/my my-int8",
        "megalite quantize runs/my my-int4 --scheme w4a16 --method gptq --data data/web_text_document",
    ),
    "prune": (
        "megalite prune runs/my my-small --layers 12 --inner 4096 --data data/web_text_document",
        "megalite prune runs/my my-24 --sparsity 2:4 --method sparsegpt --data data/web_text_document",
    ),
    "teacher-logits": (
        "megalite teacher-logits distil.yaml --count 64",
        "torchrun --nproc-per-node=8 -m megalite teacher-logits distil.yaml objective.teacher_logits=data/web_teacher",
    ),
    "inspect": (
        "megalite inspect data/web_text_document --tokenizer data/tokenizer",
        "megalite inspect configs/quickstart.yaml --split valid --count 3",
    ),
    "trace": (
        "megalite trace runs/my --step 1200 --sample 7 --token 33",
        "megalite trace runs/my --document corpus/web.jsonl:88",
    ),
    "forget": (
        "megalite forget runs/my --documents ids.txt --dry-run",
        "megalite forget runs/my --documents ids.txt --corpora",
    ),
    "contamination": (
        "megalite contamination configs/my.yaml --tasks arc_easy,hellaswag",
        "megalite contamination runs/my --data held-out.jsonl --output contamination.jsonl",
    ),
    "parity": ("megalite parity runs/one runs/other --tolerance 1e-5",),
    "synthesize": (
        "megalite synthesize configs/synthesize/questions.yaml",
        "megalite synthesize configs/synthesize/questions.yaml rows=400 endpoint.concurrency=32",
    ),
    "runs": ("megalite runs", "megalite runs /data/experiments"),
    "compare": (
        "megalite compare runs/small-lr runs/large-lr",
        "megalite compare runs/sweep/trial-00* --output compare",
    ),
    "ops": ("megalite ops",),
    "convert": (
        "megalite convert runs/my my-model",
        "megalite convert runs/my my-model --dtype bf16 --ema",
        "megalite convert DENSE OUT --experts 8",
        "megalite convert runs/my my.gguf --gguf Q8_0",
    ),
    "push": (
        "megalite push runs/my my-team/my-model",
        "megalite push my-int8 my-team/my-int8 --public",
    ),
}
