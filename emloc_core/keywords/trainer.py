"""The fields of TRL's configs as keywords of ``train`` and ``polish``, for editors and type checkers.

Those of ``SFTConfig`` and ``DPOConfig`` that are not settings of EMLoC, and that a stage does not set itself. A field
that a later version of TRL adds goes into ``extra``.
"""

from typing import Any, TypedDict

from emloc_core.keywords.settings import PolishKwargs, TrainKwargs


class TrainerFields(TypedDict, total=False):
    """The fields, with the types that JSON has."""

    accelerator_config: dict[str, Any] | str | None
    activation_checkpointing_kwargs: dict[str, Any] | str | None
    activation_offloading: bool
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    auto_find_batch_size: bool
    average_tokens_across_devices: bool
    batch_eval_metrics: bool
    bf16_full_eval: bool
    completion_only_loss: bool | None
    data_seed: int | None
    dataloader_drop_last: bool
    dataloader_in_order: bool
    dataloader_multiprocessing_context: str | None
    dataloader_num_workers: int
    dataloader_persistent_workers: bool
    dataloader_pin_memory: bool
    dataloader_prefetch_factor: int | None
    dataset_num_proc: int | None
    ddp_backend: str | None
    ddp_broadcast_buffers: bool | None
    ddp_bucket_cap_mb: int | None
    ddp_find_unused_parameters: bool | None
    ddp_static_graph: bool | None
    ddp_timeout: int
    debug: str | list[str]
    disable_dropout: bool
    discopop_tau: float
    enable_jit_checkpoint: bool
    eval_accumulation_steps: int | None
    eval_delay: float
    eval_do_concat_batches: bool
    eval_packing: bool | None
    eval_use_gather_object: bool
    f_alpha_divergence_coef: float
    f_divergence_type: str
    fp16: bool
    fp16_full_eval: bool
    full_determinism: bool
    gradient_checkpointing_kwargs: dict[str, Any] | str | None
    include_for_metrics: list[str]
    include_num_input_tokens_seen: str | bool
    label_names: list[str] | None
    label_smoothing: float
    label_smoothing_factor: float
    ld_alpha: float | None
    length_column_name: str
    liger_kernel_config: dict[str, bool] | None
    log_level: str
    log_on_each_node: bool
    logging_first_step: bool
    logging_nan_inf_filter: bool
    loss_type: str
    loss_weights: list[float] | None
    lr_scheduler_kwargs: dict[str, Any] | str | None
    lr_scheduler_type: str
    max_grad_norm: float
    neftune_noise_alpha: float | None
    optim: str
    optim_args: str | None
    optim_target_modules: str | list[str] | None
    packing: bool
    packing_strategy: str
    pad_to_multiple_of: int | str | None
    padding_free: bool
    per_device_eval_batch_size: int
    precompute_ref_batch_size: int | None
    precompute_ref_log_probs: bool
    prediction_loss_only: bool
    project: str
    ref_model_mixup_alpha: float
    ref_model_sync_steps: int
    remove_unused_columns: bool
    restore_callback_states_from_checkpoint: bool
    router_aux_loss_coef: float | None
    run_name: str | None
    save_on_each_node: bool
    shuffle_dataset: bool
    sync_ref_model: bool
    tf32: bool | None
    torch_compile: bool
    torch_compile_backend: str | None
    torch_compile_mode: str | None
    torch_empty_cache_steps: int | None
    train_sampling_strategy: str
    use_cache: bool
    use_cpu: bool
    use_liger_kernel: bool
    use_weighting: bool
    warmup_steps: float
    weight_decay: float


class TrainAllKwargs(TrainKwargs, TrainerFields, total=False):
    """Everything that ``train`` takes as a setting."""


class PolishAllKwargs(PolishKwargs, TrainerFields, total=False):
    """Everything that ``polish`` takes as a setting."""
