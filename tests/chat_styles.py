"""Chat templates in the manners of well-known models, tokenizers of the kinds that they have, and
random chats.

Each template is written anew after how the model's own behaves: what it trims, drops, refuses,
numbers and ends."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}{% generation %}{{- message.content + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{- message.content + '<|im_end|>' }}{% endif %}{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
LLAMA2 = """\
{%- if messages[0].role == 'system' %}{% set turns = messages[1:] %}{% set system = messages[0].content %}
{%- else %}{% set turns = messages %}{% set system = '' %}{% endif %}
{%- for message in turns %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- if message.role == 'user' %}
{%- set said = ('<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' if loop.first and system else '') + message.content %}
{{- bos_token + '[INST] ' + said.strip() + ' [/INST]' }}
{%- else %}{% generation %}{{- ' ' + message.content.strip() + ' ' + eos_token }}{% endgeneration %}{% endif %}
{%- endfor %}"""
LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
{%- if message.role == 'assistant' %}{% generation %}{{- message.content | trim + '<|eot_id|>' }}{% endgeneration %}
{%- else %}{{- message.content | trim + '<|eot_id|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
# Tools stand before the last turn of the user, so that no prefix of a conversation renders as a
# prefix.
MISTRAL = """\
{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}
{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'user' %}
{%- if tools and message == users[-1] %}{{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}
{{- '[INST] ' + message.content + '[/INST]' }}
{%- elif message.role == 'tool' %}{{- '[TOOL_RESULTS] ' + message.content + '[/TOOL_RESULTS]' }}
{%- elif message.tool_calls %}
{%- generation %}{{- '[TOOL_CALLS] [' }}{% for call in message.tool_calls %}
{{- '{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) + '}' }}
{%- if not loop.last %}{{- ', ' }}{% endif %}{% endfor %}{{- ']' + eos_token }}{% endgeneration %}
{%- elif message.role == 'assistant' %}{% generation %}{{- ' ' + message.content + eos_token }}{% endgeneration %}
{%- else %}{{ raise_exception('only user, tool and assistant roles are supported') }}{% endif %}
{%- endfor %}"""
GEMMA = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}
{%- if message.role == 'assistant' %}
{%- generation %}{{- message.content | trim + '<end_of_turn>\\n' }}{% endgeneration %}
{%- else %}{{- message.content | trim + '<end_of_turn>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{% endif %}"""
PHI3 = """\
{%- for message in messages %}
{{- '<|' + message.role + '|>\\n' }}
{%- if message.role == 'assistant' %}{% generation %}{{- message.content + '<|end|>\\n' }}{% endgeneration %}
{%- else %}{{- message.content + '<|end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{% else %}{{- eos_token }}{% endif %}"""
# Thoughts are kept behind the last turn of the user alone, and stand there also where there are
# none.
QWEN3 = """\
{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}
{%- set ns = namespace(last=0) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
{%- if message.role == 'tool' %}{{- '<|im_start|>user\\n<tool_response>\\n' + message.content }}
{{- '\\n</tool_response><|im_end|>\\n' }}
{%- elif message.role == 'assistant' %}
{%- set content = message.content or '' %}{% set thoughts = message.reasoning_content or '' %}
{%- if not thoughts and '</think>' in content %}
{%- set thoughts = content.split('</think>')[0].split('<think>')[-1] %}{% set content = content.split('</think>')[-1] %}
{%- endif %}
{{- '<|im_start|>assistant\\n' }}{% generation %}
{%- if loop.index0 > ns.last and (loop.last or thoughts) %}
{{- '<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
{%- else %}{{- content }}{% endif %}
{%- for call in message.tool_calls or [] %}
{%- if content or not loop.first %}{{- '\\n' }}{% endif %}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) }}
{{- '}\\n</tool_call>' }}{% endfor %}{{- '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}
{%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""
# The model is asked with the beginning of its thoughts, which no answer of a conversation keeps.
R1 = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'system' %}{{- message.content }}
{%- elif message.role == 'user' %}{{- '<|User|>' + message.content }}
{%- else %}{{- '<|Assistant|>' }}{% generation %}{{- message.content.split('</think>')[-1] + eos_token }}
{%- endgeneration %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|Assistant|><think>\\n' }}{% endif %}"""
ZEPHYR = """\
{%- for message in messages %}
{{- '<|' + message.role + '|>\\n' }}{% if message.role == 'assistant' %}
{%- generation %}{{- message.content + eos_token }}{% endgeneration %}{{- '\\n' }}
{%- else %}{{- message.content + eos_token + '\\n' }}{% endif %}
{%- if loop.last and add_generation_prompt %}{{- '<|assistant|>\\n' }}{% endif %}
{%- endfor %}"""
# Writes a system prompt of its own where there is none.
COMMAND_R = """\
{{- bos_token + '<|START|><|SYSTEM|>' }}
{{- messages[0].content if messages[0].role == 'system' else 'You are Command-R.' }}{{- '<|END|>' }}
{%- for message in messages if message.role != 'system' %}
{{- '<|START|>' + ('<|CHATBOT|>' if message.role == 'assistant' else '<|USER|>') }}
{%- if message.role == 'assistant' %}{% generation %}{{- message.content.strip() + '<|END|>' }}{% endgeneration %}
{%- else %}{{- message.content.strip() + '<|END|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|START|><|CHATBOT|>' }}{% endif %}"""
# Numbers its turns, and has no token that ends one.
ROUNDS = """\
{%- for message in messages %}
{%- if message.role == 'user' %}{{- '[Round ' ~ (loop.index0 // 2 + 1) ~ ']\\nQ: ' + message.content + '\\nA:' }}
{%- elif message.role == 'assistant' %}{% generation %}{{- ' ' + message.content + '\\n\\n' }}{% endgeneration %}
{%- else %}{{- message.content + '\\n' }}{% endif %}
{%- endfor %}"""
# The last turn ends in another way than those before it.
HARMONY = """\
{%- for message in messages %}
{{- '<|start|>' + message.role + '<|message|>' }}
{%- if message.role == 'assistant' %}{% generation %}
{{- message.content + ('<|return|>' if loop.last else '<|end|>') }}{% endgeneration %}
{%- else %}{{- message.content + '<|end|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant<|message|>' }}{% endif %}"""

STYLES: Mapping[str, str] = {
    "chatml": CHATML, "llama2": LLAMA2, "llama3": LLAMA3, "mistral": MISTRAL, "gemma": GEMMA, "phi3": PHI3,
    "qwen3": QWEN3, "r1": R1, "zephyr": ZEPHYR, "command-r": COMMAND_R, "rounds": ROUNDS, "harmony": HARMONY,
}  # fmt: skip
ENDS: Mapping[str, tuple[str, str]] = {
    "chatml": ("<|im_end|>", "<|im_end|>"), "llama2": (" </s>", " </s>"), "llama3": ("<|eot_id|>", "<|eot_id|>"),
    "mistral": ("</s>", "</s>"), "gemma": ("<end_of_turn>", "<end_of_turn>"), "phi3": ("<|end|>", "<|end|>\n</s>"),
    "qwen3": ("<|im_end|>", "<|im_end|>"), "r1": ("</s>", "</s>"), "zephyr": ("</s>", "</s>"),
    "command-r": ("<|END|>", "<|END|>"), "rounds": ("\n\n", "\n\n</s>"), "harmony": ("<|end|>", "<|return|>"),
}  # fmt: skip
"""What ends an answer in the middle of a conversation, and the last one."""
TRIMS = {"llama2", "llama3", "gemma", "command-r"}
LEADS = {"llama2": " ", "mistral": " ", "rounds": " "}
"""What a style puts before each answer."""
ALTERNATES = {"llama2", "gemma"}
WITHOUT_SYSTEM = {"mistral", "gemma"}
TOKENIZERS = ("bytes", "bytes-nfc", "unigram", "metaspace", "metaspace-first", "wordpiece")
CONTROLS = (
    "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]",
    "<start_of_turn>", "<end_of_turn>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|User|>",
    "<|Assistant|>", "<|START|>", "<|END|>", "<|SYSTEM|>", "<|USER|>", "<|CHATBOT|>", "<|start|>", "<|message|>",
    "<|return|>",
)  # fmt: skip
NOT_SPECIAL = ("<think>", "</think>", "<tool_call>", "</tool_call>")
ADDED = {*CONTROLS, *NOT_SPECIAL}
WORDS = (
    "the", "capital", "of", "France", "is", "Paris", "hello", "world", "ünï", "✓", "日本語", "a\nb", "x  y", "\n",
    " ", "  ", "1", "23", "don't", "🙂🙂", "é\u0301", "e\u0301", "def f(x):\n    return x", "\t", "tools", "<b>",
    "user", "assistant",
)  # fmt: skip
# GPT-2's letters for bytes: printable ones stand for themselves, the others for what follows 255.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTES = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + n): byte for n, byte in enumerate(_OTHERS)
}
TEXTS = [" ".join(WORDS[start:] + WORDS[:start]) for start in range(len(WORDS))]


def without_generation(template: str) -> str:
    """The same template as most models have it: with nothing that says what the model is to
    learn."""
    template = re.sub(r"(\{%-?\s*)generation\b", r"\1if true", template)
    return re.sub(r"(\{%-?\s*)endgeneration\b", r"\1endif", template)


def write_style(folder: Path, template: str, tokenizer: str) -> Path:
    """Write a tokenizer of one of the kinds, with a chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    _trained(tokenizer).save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(template)
    return folder


def random_chat(random: random.Random, style: str) -> list[dict[str, Any]]:
    """A chat that the style can render, whose texts begin and end with anything."""

    def text(number: int = 0) -> str:
        words = random.choices(WORDS, k=random.randint(1, 6))
        return (
            " ".join(words).replace("x", f"#{number}")
            + f"#{number}"
            + random.choice(("", "", " ", "\n", "✓"))
        )

    messages = [{"role": "system", "content": text()}] * (
        style not in WITHOUT_SYSTEM and random.random() < 0.4
    )
    for number in range(random.randint(1, 3)):
        messages += [
            {"role": "user", "content": text()},
            {"role": "assistant", "content": text(1 + number)},
        ]
    if style not in ALTERNATES and random.random() < 0.2:
        messages.append({"role": "user", "content": text()})
    return messages


def answers_of(messages: list[dict[str, Any]], style: str) -> list[str]:
    """What is learned of each answer, as the style writes it."""
    found = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            is_last = number == len(messages) - 1
            content = message["content"].strip() if style in TRIMS else message["content"]
            thoughts = "<think>\n\n</think>\n\n" if style == "qwen3" and is_last else ""
            content = content.lstrip("\n") if thoughts else content
            found.append(LEADS.get(style, "") + thoughts + content + ENDS[style][is_last])
    return found


def surfaces(kind: str, tokens: list[str]) -> list[bytes] | None:
    """The bytes of each token, for kinds that lose nothing: told by the vocabulary alone."""
    if kind.startswith("bytes"):
        return [
            token.encode() if token in ADDED else bytes(BYTES[letter] for letter in token)
            for token in tokens
        ]
    if kind == "wordpiece":
        return None
    found = []
    for token in tokens:
        byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
        found.append(bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode())
        if found[-3:] == [b"\xe2", b"\x96", b"\x81"]:  # a space that bytes tell
            found[-3:] = [b"", b"", b" "]
    return found


def wanted_mask(surface: list[bytes], text: str, spans: list[tuple[int, int]]) -> list[int]:
    """1 for each token that holds a byte of a span of characters. A space that only the tokenizer
    puts somewhere is no byte of the text, and belongs to what it stands before."""
    whole, mask, place = text.encode(), [], 0
    learned = [(len(text[:a].encode()), len(text[:b].encode())) for a, b in spans]
    for piece in surface:
        if not whole.startswith(piece, place):
            piece = piece.removeprefix(b" ")
        assert whole.startswith(piece, place), (piece, whole[place:][:20])
        stop = max(place + len(piece), place + 1)
        mask.append(int(any(a < stop and place < b for a, b in learned)))
        place += len(piece)
    assert place == len(whole)
    return mask


@cache
def _trained(kind: str) -> tokenizers.Tokenizer:
    if kind.startswith("unigram"):
        return _unigram(has_space=kind == "unigram")
    if kind == "wordpiece":
        tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.BertNormalizer(strip_accents=False)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer: Any = trainers.WordPieceTrainer(
            vocab_size=500, special_tokens=list(CONTROLS), show_progress=False
        )
    else:
        tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
        if kind.startswith("bytes"):
            tokenizer.normalizer = normalizers.NFC() if kind == "bytes-nfc" else None
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
        else:
            scheme = "first" if kind == "metaspace-first" else "always"
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
            tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme, split=True)
        alphabet = (
            pre_tokenizers.ByteLevel.alphabet()
            if kind.startswith("bytes")
            else list("[]{}<>|:/_#\"'\n\t ")
        )
        trainer = trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=list(CONTROLS),
            initial_alphabet=alphabet,
            show_progress=False,
        )
    tokenizer.train_from_iterator(
        [*TEXTS, *STYLES.values(), "#1✓ #2✓ #3✓ #0✓ 4 5 6 7 8 9 [4]"], trainer
    )
    tokenizer.add_tokens(
        [AddedToken(token, normalized=False, special=False) for token in NOT_SPECIAL]
    )
    return tokenizer


def _unigram(has_space: bool) -> tokenizers.Tokenizer:
    """As Llama's was made of a SentencePiece model: bytes stand for letters it does not know, a
    space before texts. Where it has no space alone, the one before such letters is told by bytes as
    well."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=[*CONTROLS, *names], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(
        ["the capital of France is Paris", "say hello to the world"] * 5, trainer
    )
    values = json.loads(tokenizer.to_str())
    values["added_tokens"] = [
        token for token in values["added_tokens"] if token["content"] not in names
    ]
    values["model"] |= {"byte_fallback": True, "unk_id": 0}
    if not has_space:
        values["model"]["vocab"] = [
            [f"{p}-" if p == "▁" else p, score] for p, score in values["model"]["vocab"]
        ]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(values))
    steps = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_tokens(
        [AddedToken(token, normalized=False, special=False) for token in NOT_SPECIAL]
    )
    return tokenizer
