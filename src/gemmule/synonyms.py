"""Suggest a setting for an unknown key: names that other programs use, then similar spellings."""

import difflib
from collections.abc import Sequence
from typing import NamedTuple

from pydantic import BaseModel

from gemmule.fields import find_section, section_of, settings_of


class Synonym(NamedTuple):
    """Names that other programs use for one of our settings, or for something that is not a setting here."""

    names: str  # separated by spaces, in lower case with underscores
    keys: tuple[str, ...] = ()  # dotted; a key in the same section is preferred
    hint: str = ""  # further advice


_STEPS = "steps = epochs x tokens of the data / (train.batch_size x train.context); `gemmule plan` shows both"
_WARMUP = "a share of the run: 0.02 warms up for the first 2 % of the steps"
_ACCUMULATION = (
    "train.batch_size counts all sequences of an optimizer step, train.micro_batch_size those that go through "
    "the model at once; gradient accumulation follows from the two"
)
_WEIGHTS = "a run starts from new weights; `gemmule train --resume` resumes a run"

# Nanotron, torchtitan, transformers, nanoGPT, litgpt, Megatron, llama2.c and others, and the usual abbreviations.
SYNONYMS = (
    Synonym("lr max_lr peak_lr base_lr initial_lr lr_max", ("optimizer.learning_rate",)),
    Synonym(
        "block_size seq_len seq_length sequence_length max_seq_len max_seq_length max_length context_length "
        "context_size context_window ctx ctx_len n_ctx n_positions max_sequence_length",
        ("train.context", "model.max_position_embeddings"),
    ),
    Synonym("max_position max_positions", ("model.max_position_embeddings",)),
    Synonym(
        "gradient_accumulation_steps gradient_accumulation_iters grad_accum grad_accum_steps accumulate_grad_batches "
        "grad_acc_steps accumulation_steps per_device_train_batch_size device_batch_size micro_batch mbs",
        ("train.micro_batch_size",),
        _ACCUMULATION,
    ),
    Synonym("batch bs train_batch_size global_batch_size total_batch_size", ("train.batch_size",)),
    Synonym("epochs num_epochs num_train_epochs max_epochs n_epochs epoch", ("train.steps",), _STEPS),
    Synonym(
        "max_steps max_iters num_steps num_iterations iterations iters total_steps train_steps training_steps n_steps "
        "train_iters",
        ("train.steps",),
    ),
    Synonym("max_time time max_minutes time_limit max_train_time", ("train.minutes",)),
    Synonym(
        "max_tokens token_budget train_tokens", ("train.steps",), "tokens = steps x train.batch_size x train.context"
    ),
    Synonym("warmup warmup_steps warmup_iters num_warmup_steps lr_warmup_steps", ("schedule.warmup_share",), _WARMUP),
    Synonym("warmup_ratio warmup_fraction warmup_percent pct_start", ("schedule.warmup_share",), _WARMUP),
    Synonym(
        "lr_scheduler_type lr_scheduler lr_schedule scheduler scheduler_type schedule_type lr_decay_style decay_type "
        "decay_lr",
        ("schedule.name",),
    ),
    Synonym(
        "min_lr lr_min lr_end min_lr_ratio final_lr min_lr_factor",
        ("schedule.final",),
        "a share of the peak, optimizer.learning_rate",
    ),
    Synonym(
        "lr_decay_iters decay_steps decay_iters decay_ratio cooldown cooldown_share warmdown warmdown_ratio",
        ("schedule.decay_share",),
        "a share of the run",
    ),
    Synonym("optim optimiser optimizer_name optimizer_type", ("optimizer.name",)),
    Synonym("wd l2", ("optimizer.weight_decay",)),
    Synonym("beta1 adam_beta1 b1", ("optimizer.beta_1",)),
    Synonym("beta2 adam_beta2 b2", ("optimizer.beta_2",)),
    Synonym("betas adam_betas", ("optimizer.beta_1",), "optimizer.beta_2 is the other"),
    Synonym("eps adam_eps adam_epsilon", ("optimizer.epsilon", "model.rms_norm_eps")),
    Synonym("norm_eps rms_eps layer_norm_eps layer_norm_epsilon rms_norm_epsilon", ("model.rms_norm_eps",)),
    Synonym(
        "grad_clip max_grad_norm clip_grad gradient_clipping gradient_clip_val clip_grad_norm clip_norm max_norm",
        ("optimizer.clip",),
    ),
    Synonym("muon_momentum", ("optimizer.momentum",)),
    Synonym("adam_lr adamw_lr embedding_lr embed_lr", ("optimizer.adamw_learning_rate",)),
    Synonym(
        "n_layer n_layers num_layers layers depth num_hidden_layer no_of_decoder_layers", ("model.num_hidden_layers",)
    ),
    Synonym("n_head n_heads num_heads heads no_of_heads num_query_heads", ("model.num_attention_heads",)),
    Synonym(
        "n_kv_head n_kv_heads num_kv_heads kv_heads no_kv_heads n_query_groups num_query_groups n_head_kv",
        ("model.num_key_value_heads",),
    ),
    Synonym(
        "n_embd d_model dim embed_dim embedding_dim embeddings_dims model_dim width emb_dim", ("model.hidden_size",)
    ),
    Synonym("hidden_dim", ("model.hidden_size",), "the MLP's width is model.intermediate_size"),
    Synonym(
        "ffn_dim d_ff mlp_dim mlp_hidden_dim n_inner ffn_hidden_size ffn_hidden_dim feed_forward_length "
        "intermediate_dim",
        ("model.intermediate_size",),
    ),
    Synonym("d_head head_size attention_head_dim kv_channels d_kv", ("model.head_dim",)),
    Synonym("vocab n_vocab vocabulary vocabulary_size num_embeddings padded_vocab_size", ("tokenizer.vocab_size",)),
    Synonym(
        "tie_embeddings tied_embeddings tie_weights weight_tying tie_word_embedding", ("model.tie_word_embeddings",)
    ),
    Synonym("rope_base rope_freq_base rotary_base rotary_emb_base", ("model.rope_theta", "model.rope_local_base_freq")),
    Synonym("rope_local_theta base_freq local_rope_theta", ("model.rope_local_base_freq",)),
    Synonym("rope_scaling rope_factor scaling_factor", ("model.rope_scaling_factor",)),
    Synonym("window window_size attention_window local_window local_block_size", ("model.sliding_window",)),
    Synonym("pattern window_pattern layer_pattern global_every layer_types", ("model.sliding_window_pattern",)),
    Synonym("drop p_drop resid_dropout resid_pdrop hidden_dropout", ("model.dropout",)),
    Synonym("attn_dropout attn_pdrop", ("model.attention_dropout",)),
    Synonym("init_std initializer_std weight_std", ("model.initializer_range",)),
    Synonym("model_size model_name model_type", ("model.size",)),
    Synonym("dtype torch_dtype mixed_precision amp bf16 fp16 fp32 half", ("train.precision",)),
    Synonym("torch_compile use_compile compile_model", ("train.compile",)),
    Synonym(
        "attn_implementation attn attention_backend flash flash_attn flash_attention use_flash", ("train.attention",)
    ),
    Synonym("random_seed manual_seed", ("train.seed",)),
    Synonym("accelerator backend", ("train.device",)),
    Synonym(
        "eval_interval eval_steps eval_every val_every val_interval val_loss_every validation_interval "
        "val_check_interval evaluation_interval",
        ("train.validate_every",),
    ),
    Synonym("eval_iters eval_batches eval_tokens val_tokens limit_val_batches", ("train.validation_tokens",)),
    Synonym(
        "save_steps save_every save_interval checkpoint_interval checkpoint_steps ckpt_every ckpt_interval save_freq",
        ("train.checkpoint_every",),
    ),
    Synonym("save_total_limit keep_last max_checkpoints", ("train.keep_checkpoints",)),
    Synonym(
        "patience early_stopping_patience early_stop early_stopping_rounds stop_early",
        ("train.early_stopping",),
    ),
    Synonym("load_best_model_at_end save_best_only keep_best best_model", ("train.final_model",)),
    Synonym("log_interval logging_steps log_steps log_freq print_every", ("train.log_every",)),
    Synonym("prompt prompts sample_prompt", ("train.sample_prompts",)),
    Synonym("max_new_tokens sample_length", ("train.sample_tokens",)),
    Synonym(
        "dataset datasets dataset_name dataset_path data_path data_dir train_file train_files train_data train_dataset "
        "train_path corpus input_file train_bin",
        ("data.train",),
    ),
    Synonym(
        "valid val dev validation_file validation_data val_file val_data val_path val_bin eval_data eval_dataset "
        "eval_file valid_file",
        ("data.validation",),
    ),
    Synonym(
        "validation_split val_split val_fraction validation_fraction validation_split_percentage test_size eval_split",
        ("data.holdout",),
    ),
    Synonym("text_column text_field text_key text_column_name content_column", ("data.column",)),
    Synonym("delimiter document_separator eot_token", ("data.separator",)),
    Synonym("mixture mixing_weights proportions probabilities sampling_weights", ("data.weights",)),
    Synonym("dedup deduplicate minhash", ("data.near_duplicates",), "exact duplicates are always dropped"),
    Synonym("tokenizer_path tokenizer_name tokenizer_file vocab_file", ("tokenizer.path",)),
    Synonym(
        "gradient_checkpointing activation_checkpoint recompute recompute_granularity use_checkpoint remat",
        ("parallel.activation_checkpointing",),
    ),
    Synonym("fsdp ddp sharding sharding_strategy zero_stage deepspeed", ("parallel.strategy",)),
    Synonym(
        "gpus num_gpus n_gpu devices num_devices world_size nproc nproc_per_node nnodes num_nodes",
        hint="torchrun starts the processes; see docs/launch.md",
    ),
    Synonym("report_to tensorboard logger trackers", ("tracking.to",)),
    Synonym(
        "wandb wandb_log wandb_project wandb_run_name use_wandb mlflow trackio",
        ("tracking.to",),
        "or the option --track; see docs/tracking.md",
    ),
    Synonym("comet neptune clearml aim", hint="there are TensorBoard, wandb, mlflow and trackio; see docs/tracking.md"),
    Synonym(
        "init_from pretrained pretrained_model from_pretrained model_name_or_path init_checkpoint load_from finetune",
        hint=_WEIGHTS,
    ),
    Synonym("resume_from resume resume_from_checkpoint load_checkpoint checkpoint checkpoint_path", hint=_WEIGHTS),
    Synonym("out out_dir output_dir save_dir run_dir run_name", hint="the option --out names the run folder"),
    Synonym("num_workers workers num_proc dataloader_num_workers", hint="`gemmule prepare --workers` sets them"),
)
SECTIONS = {
    "dataset": "data", "corpus": "data", "tokeniser": "tokenizer", "network": "model", "arch": "model",
    "architecture": "model", "training": "train", "trainer": "train", "training_args": "train", "optim": "optimizer",
    "scheduler": "schedule", "lr_scheduler": "schedule", "distributed": "parallel", "parallelism": "parallel",
}  # fmt: skip
_BY_NAME = {name: synonym for synonym in SYNONYMS for name in synonym.names.split()}
# Minimum similarity of a suggestion.
_ALIKE = 0.75


def suggest(schema: type[BaseModel], location: Sequence[str], is_section: bool = False) -> str:
    """Return a message for an unknown key, with a suggestion or the known keys."""
    *sections, name = location
    name = name.lower().replace("-", "_")
    if is_section:
        meant, hint = _meant_section(schema, name), ""
    else:
        meant, hint = _meant_setting(schema, sections, name)
    what = "section" if is_section else "setting"
    if meant:
        return f"no such {what}; did you mean {meant}?" + (f" ({hint})" if hint else "")
    owner = None if is_section else find_section(schema, sections)
    known = ", ".join((owner or schema).model_fields)
    place = ".".join(sections) if owner and sections else "a recipe"
    return f"no such {what}; " + (hint or f"{place} has {known}")


def _meant_section(schema: type[BaseModel], name: str) -> str | None:
    sections = [key for key in schema.model_fields if section_of(schema, key)]
    return _one_of([SECTIONS.get(name, name)], sections) or _alike(name, sections)


def _meant_setting(schema: type[BaseModel], sections: Sequence[str], name: str) -> tuple[str | None, str]:
    """Return the most likely key of those that exist, and a hint."""
    keys = {setting.key: setting.key.rpartition(".")[2] for setting in settings_of(schema)}
    here = {key: last for key, last in keys.items() if key.split(".")[:-1] == list(sections)}
    synonym = _BY_NAME.get(name)
    if synonym:
        meant = _one_of(synonym.keys, list(here)) or _one_of(synonym.keys, list(keys))
        if meant or not synonym.keys:
            return meant, synonym.hint
    for group in (here, keys):
        for key, last in group.items():
            if last == name:
                return key, ""
        if alike := _alike(name, list(group.values())):
            return next(key for key, last in group.items() if last == alike), ""
    return _meant_section(schema, name), ""


def _one_of(wanted: Sequence[str], known: Sequence[str]) -> str | None:
    return next((key for key in wanted if key in known), None)


def _alike(name: str, known: Sequence[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=_ALIKE)), None)
