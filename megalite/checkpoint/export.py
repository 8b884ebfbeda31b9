"""What makes a folder of safetensors a Hugging Face model: config.json, generation_config.json and the tokenizer; or an
adapter of PEFT's: adapter_config.json. A run that started from such a model takes along what it had of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from megalite.checkpoint.folder import remove, write_json
from megalite.config import Config
from megalite.data.chat import ChatTemplate
from megalite.data.tokenizer import Tokenizer, load_tokenizer
from megalite.data.tokenizer_files import copy_files
from megalite.errors import DataError
from megalite.models import SPECIAL, peft, read_hf_config, to_hf_config, weight_table
from megalite.outside import read_object

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
SOURCE = "source"
"""Folder in that of the run: what it started from may be elsewhere, or nowhere, when it goes on."""
GENERATION = "generation_config.json"


def keep_source(config: Config) -> None:
    """Copy into the run's folder what a Hugging Face model has beside its weights, where the run starts from one."""
    folder = config.run.folder / SOURCE
    if config.model.hf is None or folder.exists():
        return
    # Under its name only when all is there: a start that is cut short must not leave a part for those after it.
    temporary = folder.with_name(f"{SOURCE}.tmp")
    remove(temporary)
    temporary.mkdir(parents=True)
    hf = config.model.hf
    where = [hf, *([peft.base_of(hf)] if peft.is_adapter(hf) else [])]
    copy_files(where, temporary, "config.json", GENERATION)
    temporary.rename(folder)


def write_extras(folder: Path, config: Config, tokenizer: Tokenizer | None) -> None:
    """Also keeps the run's own config beside them, as config.yaml."""
    source, dtype = config.run.folder / SOURCE, DTYPES[config.train.precision]
    (folder / "config.yaml").write_text(config.to_yaml())
    # All are written: what is left out, transformers takes from the family's first model.
    ids: dict[str, Any] = dict.fromkeys(SPECIAL) | {"eos_token_id": tokenizer.eod_id if tokenizer else None}
    if (source / "config.json").is_file():
        stored = read_hf_config(source)
        ids |= {name: stored[name] for name in SPECIAL if stored.get(name) is not None}
    if config.model.task == "classification" and ids["pad_token_id"] is None:
        # transformers finds the last token of each of several texts by what fills them up; no text ends with this one.
        end = ids["eos_token_id"]
        ids["pad_token_id"] = end[0] if isinstance(end, list) else end
    write_json(folder / GENERATION, ids | {"do_sample": True})
    if (source / GENERATION).is_file():
        shutil.copyfile(source / GENERATION, folder / GENERATION)
    if tokenizer:
        tokenizer.save(folder)
    else:
        copy_files([source], folder)
    if config.model.task == "causal":
        _add_turn_end(folder, ids["eos_token_id"], tokenizer)
    if config.lora:
        assert config.model.hf is not None
        write_json(folder / peft.CONFIG, peft.to_peft(config.lora, weight_table(config.model), config.model.hf))
        return
    # The name that every version of transformers and vLLM reads.
    write_json(folder / "config.json", to_hf_config(config.model) | ids | {"torch_dtype": dtype})


def _add_turn_end(folder: Path, ends: Any, tokenizer: Tokenizer | None) -> None:
    """Add to eos_token_id of generation_config.json, `ends` where it has none, the tokens by which the chat template of
    the folder ends an answer: whoever generates with the folder then stops there."""
    if not _has_template(folder):
        return
    file = folder / GENERATION
    try:
        values = read_object(file, DataError)
        tokenizer = tokenizer or load_tokenizer(folder)
        found = ChatTemplate.of(folder, tokenizer).turn_end.ids(tokenizer).tokens
    except (DataError, ValueError):  # the template cannot be rendered here, or the model came with a broken file
        return
    ends = ends if values.get("eos_token_id") is None else values["eos_token_id"]
    known = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if new := [token for token in found if token not in known]:
        write_json(file, values | {"eos_token_id": [*known, *new]})


def _has_template(folder: Path) -> bool:
    """Known before transformers is imported, which takes long."""
    settings = folder / "tokenizer_config.json"
    return (folder / "chat_template.jinja").is_file() or (
        settings.is_file() and '"chat_template"' in settings.read_text(encoding="utf-8")
    )
