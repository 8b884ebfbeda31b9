"""Names that other trainers have for settings of a config: whoever writes one is told the key."""

from __future__ import annotations

from collections.abc import Iterable

KEYS = {
    "optimizer.lr": ("learning_rate", "max_lr", "peak_lr", "base_lr"),
    "optimizer.schedule.min_lr": ("min_decay_lr", "min_learning_rate", "end_lr", "lr_min"),
    "optimizer.schedule.warmup_steps": (
        "lr_warmup_iters", "lr_warmup_steps", "num_warmup_steps", "warmup", "warmup_iters",
        "warmup_ratio", "warmup_samples",
    ),
    "optimizer.schedule.name": (
        "lr_scheduler", "lr_scheduler_type", "lr_decay_style", "scheduler", "lr_schedule",
    ),
    "optimizer.name": ("optimizer_factory", "optim", "optimizer_type"),
    "optimizer.clip": (
        "clip_grad_norm", "clip_grad", "gradient_clipping", "max_grad_norm", "grad_clip",
        "gradient_clip_val",
    ),
    "optimizer.betas": ("adam_betas", "adam_beta1", "adam_beta2", "beta1", "beta2"),
    "optimizer.eps": ("adam_eps", "adam_epsilon", "epsilon"),
    "optimizer.state_dtype": ("exp_avg_dtype", "exp_avg_sq_dtype", "optim_bits"),
    "optimizer.weight_decay": ("wd", "decay"),
    "train.global_batch_size": (
        "batch_accumulation_per_replica", "batch_size", "train_batch_size", "gbs", "bs",
        "global_batch", "gradient_accumulation_steps", "gradient_accumulation", "grad_accum",
    ),
    "train.micro_batch_size": (
        "micro_batch", "mbs", "per_device_train_batch_size", "per_device_batch_size",
        "train_micro_batch_size_per_gpu", "device_batch_size", "local_batch_size",
    ),
    "train.steps": (
        "max_steps", "num_steps", "train_iters", "train_steps", "iterations", "max_iters",
        "total_steps", "iters", "steps",
    ),
    "train.tokens": ("train_tokens", "max_tokens", "num_tokens"),
    "train.epochs": ("num_epochs", "num_train_epochs", "max_epochs", "n_epochs", "epoch"),
    "train.precision": ("dtype", "bf16", "fp16", "fp32", "mixed_precision", "torch_dtype"),
    "train.fp8.recipe": ("fp8_recipe", "fp8_format", "float8_recipe_name"),
    "train.fp8.param_gather": (
        "fp8_param_gather", "fp8_param", "enable_fsdp_float8_all_gather", "float8_all_gather",
    ),
    "train.fp8.first_last_bf16": ("first_last_layers_bf16",),
    "train.fake_quantize": ("qat", "quantization_aware_training"),
    "train.fake_quantize.start_step": ("fake_quant_after_n_steps",),
    "train.fake_quantize.group": ("group_size", "groupsize"),
    "train.recompute": (
        "recompute_layer", "activation_checkpointing", "gradient_checkpointing",
        "recompute_granularity", "checkpoint_activations", "enable_activation_checkpointing",
    ),
    "train.batch_ramp": ("rampup_batch_size",),
    "train.seed": ("random_seed",),
    "train.compile": ("torch_compile",),
    "parallel.tensor": (
        "tensor_parallel_dim", "tp", "tp_size", "tensor_parallel", "tensor_parallel_size",
        "tensor_model_parallel_size", "tensor_parallel_degree", "model_parallel_size",
        "model_parallel",
    ),
    "parallel.pipeline": (
        "pp", "pp_size", "pipeline_parallel", "pipeline_parallel_size",
        "pipeline_model_parallel_size", "pipeline_parallel_degree", "pipe_parallel_size",
    ),
    "parallel.virtual": (
        "num_virtual_stages_per_pipeline_rank", "vpp", "virtual_pipeline_model_parallel_size",
        "num_virtual_stages",
    ),
    "parallel.context": (
        "context_parallel_dim", "cp", "cp_size", "context_parallel", "context_parallel_size",
        "context_parallel_degree", "sequence_parallel_size",
    ),
    "parallel.expert": (
        "ep", "ep_size", "expert_parallel", "expert_parallel_size", "expert_model_parallel_size",
        "expert_parallel_degree",
    ),
    "parallel.sequence": ("tp_mode", "sp", "sequence_parallel"),
    "parallel.tensor_overlap": ("tp_comm_overlap", "enable_async_tensor_parallel"),
    "parallel.zero_stage": (
        "zero", "zero_optimization", "use_distributed_optimizer", "fsdp", "stage", "zero_level",
    ),
    "data.seq_length": (
        "sequence_length", "seq_len", "max_seq_len", "max_seq_length", "block_size",
        "context_length", "sequence_len", "cutoff_len",
    ),
    "data.train": (
        "data_stages", "data_path", "data_paths", "dataset", "datasets", "train_data",
        "train_data_path", "train_data_paths",
    ),
    "data.valid": (
        "test_datasets", "valid_data_path", "val_data", "validation", "eval_data",
        "valid_data_paths",
    ),
    "data.tokenizer": (
        "tokenizer_config", "tokenizer_path", "tokenizer_model", "tokenizer_name",
        "tokenizer_name_or_path", "vocab_file",
    ),
    "data.packing": ("packed", "sample_packing", "pack_sequences"),
    "checkpoint.every": (
        "checkpoint_factor", "save_interval", "save_steps", "save_every", "checkpoint_interval",
        "save_freq",
    ),
    "checkpoint.keep": ("save_total_limit", "keep_last_n_checkpoints"),
    "checkpoint.resume": ("load", "resume_from_checkpoint", "resume_checkpoint_path", "load_path"),
    "run.dir": ("output_dir", "save", "save_dir", "checkpoints_path"),
    "run.name": (
        "wandb_exp_name", "wandb_name", "run_name", "exp_name", "experiment_name", "experiment",
    ),
    "observe.log_every": (
        "iteration_step_info_interval", "log_every_n_steps", "log_interval", "logging_steps",
        "log_freq",
    ),
    "observe.eval_every": (
        "eval_interval", "eval_steps", "val_check_interval", "evaluation_interval",
    ),
    "observe.eval_batches": ("eval_iters", "limit_val_batches"),
    "observe.wandb.project": ("wandb_project",),
    "model.hf": (
        "checkpoint_dir", "pretrained_checkpoint", "base_model", "pretrained", "model_name_or_path",
        "pretrained_model_name_or_path", "init_from",
    ),
    "model.hidden_size": ("d_model", "n_embd", "dim", "embed_dim", "hidden_dim", "emb_dim"),
    "model.num_layers": ("n_layer", "n_layers", "num_hidden_layers", "layers"),
    "model.num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "model.num_kv_heads": ("num_query_groups", "num_key_value_heads", "n_kv_heads"),
    "model.intermediate_size": ("ffn_hidden_size", "ffn_dim", "mlp_dim"),
    "model.max_positions": ("max_position_embeddings", "n_positions"),
    "model.tie_embeddings": ("tie_word_embeddings", "weight_tying"),
    "model.vocab_size": ("padded_vocab_size", "n_vocab"),
    "lora.rank": ("lora_rank", "lora_r", "r"),
    "lora.alpha": ("lora_alpha",),
    "lora.targets": ("lora_target_modules", "target_modules", "lora_attn_modules"),
    "lora.quantize_base": ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type"),
    "model.rope_theta": ("rotary_base", "rotary_emb_base"),
    "model.init_std": ("init_method_std",),
    "data.split": ("val_set_size",),
    "data.document_mask": ("reset_attention_mask",),
    "train.patience": ("early_stopping_patience",),
    "parallel.expert_tensor": ("expert_tensor_parallel_size",),
    "health.hang_timeout_s": ("distributed_timeout_minutes", "nccl_timeout"),
}  # fmt: skip
"""Keys, each with the names that other trainers have for it."""

FOLLOWS = dict.fromkeys(
    ("dp", "dp_size", "data_parallel", "data_parallel_size", "data_parallel_degree"),
    "data-parallel ranks are those that the other axes leave over: leave it out",
)
"""What is said to names of other trainers for what is not set here."""

_BY_NAME = {name: key for key, names in KEYS.items() for name in names}


def key_of(name: object, known: Iterable[str]) -> str | None:
    """Return the key that somebody means who writes `name`, which is none where it stands; None if
    nothing is known. `known` are all keys."""
    # Many of these names are options of other trainers' command lines, with dashes.
    plain = str(name).lower().replace("-", "_")
    if plain in _BY_NAME:
        return _BY_NAME[plain]
    elsewhere = [key for key in known if key.rpartition(".")[2] == plain]
    # A name that several sections have, such as `name`, says nothing about which is meant.
    return elsewhere[0] if len(elsewhere) == 1 else None
