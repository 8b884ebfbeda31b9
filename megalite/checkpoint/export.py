"""Writes what makes a folder of safetensors a Hugging Face model: config.json,
generation_config.json and the tokenizer; or a PEFT adapter: adapter_config.json. A run that started
from such a model keeps that model's files.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from megalite.checkpoint.card import write_card
from megalite.checkpoint.folder import remove, write_json
from megalite.config import Config
from megalite.data.chat import ChatTemplate
from megalite.data.tokenizer import Tokenizer, load_tokenizer
from megalite.data.tokenizer_files import copy_files
from megalite.errors import DataError
from megalite.models import SPECIAL, peft, read_hf_config, to_hf_config, weight_table
from megalite.utils.outside import read_object

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
SOURCE = "source"
"""Subfolder of the run's with the files of the model it started from, which may be gone when the
run is resumed."""
GENERATION = "generation_config.json"


def keep_source(config: Config) -> None:
    """Copy what a Hugging Face model has beside its weights into the run's folder, if the run
    starts from one."""
    folder = config.run.folder / SOURCE
    if config.model.hf is None or folder.exists():
        return
    # Renamed when complete: a start that is interrupted must not leave a part that later starts
    # take for all.
    temporary = folder.with_name(f"{SOURCE}.tmp")
    remove(temporary)
    temporary.mkdir(parents=True)
    hf = config.model.hf
    where = [hf]
    if peft.is_adapter(hf):
        where.append(peft.base_of(hf))
    copy_files(where, temporary, "config.json", GENERATION)
    temporary.rename(folder)


def write_extras(folder: Path, config: Config, tokenizer: Tokenizer | None) -> None:
    """Write config.json, generation_config.json, tokenizer, the model card and the run's own
    config.yaml to a checkpoint's `folder`.

    `tokenizer` is the run's; without one, the files of the model it started from are taken."""
    source = config.run.folder / SOURCE
    (folder / "config.yaml").write_text(config.to_yaml())
    write_card(folder, config)
    # All ids are written, also as null: for missing ones transformers takes those of the family's
    # first model.
    model = to_hf_config(config.model)
    ids: dict[str, Any] = {name: model[name] for name in SPECIAL}
    ids["eos_token_id"] = tokenizer.eod_id if tokenizer else None
    if (source / "config.json").is_file():
        stored = read_hf_config(source)
        # What the starting model said wins over what the tokenizer says.
        ids |= {name: stored[name] for name in SPECIAL if stored.get(name) is not None}
    if config.model.task == "classification" and ids["pad_token_id"] is None:
        # transformers finds the last token of each text in a batch by the padding after it. The end
        # token serves: no text to classify ends with it.
        end = ids["eos_token_id"]
        ids["pad_token_id"] = end[0] if isinstance(end, list) else end
    # A source has one answer, which begins with a token of its own.
    is_answered = config.model.task == "seq2seq"
    start = {"decoder_start_token_id": config.model.START_TOKEN} if is_answered else {}
    write_json(folder / GENERATION, ids | start | {"do_sample": not is_answered})
    if (source / GENERATION).is_file():
        shutil.copyfile(source / GENERATION, folder / GENERATION)
    if tokenizer:
        tokenizer.save(folder)
    else:
        copy_files([source], folder)
    if config.model.task == "causal":
        _add_turn_end(folder, ids["eos_token_id"], tokenizer)
    for name, values in config.objective.files().items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_json(folder / name, values)
    if config.lora:
        assert config.model.hf is not None
        task_type = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}.get(config.model.task)
        adapter = peft.to_peft(config.lora, weight_table(config.model), config.model.hf, task_type)
        write_json(folder / peft.CONFIG, adapter)
        return
    # "torch_dtype" is the key that every version of transformers and vLLM reads.
    dtype = DTYPES[config.train.precision]
    write_json(folder / "config.json", model | ids | {"torch_dtype": dtype})


def _add_turn_end(folder: Path, ends: Any, tokenizer: Tokenizer | None) -> None:
    """Add the tokens by which the folder's chat template ends an answer to eos_token_id of
    generation_config.json, so that whoever generates with the folder stops there. `ends` are used
    if the file has none."""
    if not _has_template(folder):
        return
    file = folder / GENERATION
    try:
        values = read_object(file, DataError)
        tokenizer = tokenizer or load_tokenizer(folder)
        found = ChatTemplate.of(folder, tokenizer).turn_end.ids(tokenizer).tokens
    except (DataError, ValueError):
        return  # the template cannot be rendered here, or the model came with a broken file
    if values.get("eos_token_id") is not None:
        ends = values["eos_token_id"]
    known = []
    if ends is not None:
        known = ends if isinstance(ends, list) else [ends]
    if new := [token for token in found if token not in known]:
        write_json(file, values | {"eos_token_id": [*known, *new]})


def _has_template(folder: Path) -> bool:
    """Return whether the folder has a chat template, without importing transformers, which takes
    long."""
    if (folder / "chat_template.jinja").is_file():
        return True
    settings = folder / "tokenizer_config.json"
    return settings.is_file() and '"chat_template"' in settings.read_text(encoding="utf-8")
