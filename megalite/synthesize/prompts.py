"""The built-in prompts. A recipe can give its own; names in braces are replaced, and nothing else
is, so that JSON may stand in a prompt as it is."""

from __future__ import annotations

import re
from collections.abc import Mapping

INSTRUCTION = """\
Here are some tasks that people have given to an assistant:

{examples}

Write one more task of that kind, about something else and worded in another way. It must be \
complete in itself and answerable in text. Write the task alone: no number, no title, no answer."""

QUESTION = """\
Here is a text:

{document}

Write one question that this text answers, and its answer. The question must be understood without \
the text; the answer must follow from the text alone. Reply with nothing but a JSON object: \
{"question": "...", "answer": "..."}"""

EXCERPT = """\
Here is a text:

{document}

Write one question that this text answers, and the words of the text that answer it, copied exactly, \
as few as suffice. Reply with nothing but a JSON object: {"question": "...", "answer": "..."}"""

PARAPHRASE = """\
Say the following text in other words, in the same language. Keep its meaning, its tone and all \
facts. Reply with the new text alone.

{text}"""

THERE = """\
Translate the following text into {through}. Reply with the translation alone.

{text}"""

BACK = """\
Translate the following text into {language}. Reply with the translation alone.

{text}"""

JUDGE = """\
Two assistants were given this task:

{prompt}

Answer A:
{first}

Answer B:
{second}

Which answer is better: more correct, more helpful, to the point? Reply with A or B alone."""


def filled(prompt: str, values: Mapping[str, str]) -> str:
    """Return a prompt with {name} replaced by the value of each name. Values are not looked into."""
    # In one pass: a document that has "{text}" in it must not be filled in turn, nor do other braces
    # need an escape, as they would with `str.format`.
    names = "|".join(map(re.escape, values))
    return re.sub(rf"\{{({names})\}}", lambda found: values[found[1]], prompt)
