"""Limits of what a chat template may do: it comes with a model, is other people's code, and may
never end.

jinja compiles a template into Python, in transformers' sandbox. Here every step that may take long
(an iteration of a loop, a call, building or comparing values) pays beforehand for what it is about
to do: in characters and items, from a budget that follows from the size of the conversation, and
within a deadline. A step between two payments is short, so that nothing needs to be interrupted."""

from __future__ import annotations

import re
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, wraps
from typing import Any

from jinja2 import nodes
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer
from transformers.utils import chat_template_utils

from megalite.errors import DataError, TemplateLimit

SECONDS = 2.0
"""Time limit of a rendering; models' own templates take milliseconds."""
BUDGET = 250_000_000
"""Characters and items that a rendering may handle."""
BUDGET_PER_ITEM = 256
"""Additional budget for each character of a conversation."""
MOST_BITS = 100_000
"""Most bits of an integer."""
MOST_DIGITS = 1_000_000
"""Largest width, precision or count that a filter or method may be given."""
LEFT_OUT = ("striptags", "urlize", "wordwrap", "xmlattr")
"""Filters for web pages whose time can grow with the square of a text's length; templates do not
get them."""
SHALLOW = frozenset((
    "attr", "batch", "count", "d", "default", "first", "items", "last", "length", "list", "map", "reject", "rejectattr",
    "reverse", "select", "selectattr", "slice",
))  # fmt: skip
"""Filters that look at the items of a list one by one, and no deeper."""
COMPARING = (
    "eq", "==", "equalto", "ne", "!=", "lt", "<", "lessthan", "le", "<=", "gt", ">", "greaterthan", "ge", ">=", "in",
)  # fmt: skip
GROWING = frozenset(
    ("center", "expandtabs", "indent", "ljust", "rjust", "tojson", "translate", "zfill", "to_bytes")
)
"""Filters and methods whose result may be longer by a factor that their arguments give."""


_now = threading.local()
"""State of the rendering in this thread: `left` of its budget, and `until` when it may take.
Outside a rendering there is no budget to pay from, so that jinja folds no constants when it
compiles."""


@contextmanager
def limits(values: Any) -> Iterator[None]:
    """Allow a template to be rendered with these `values` inside the block. Raise TemplateLimit if
    it exceeds the limits."""
    _now.left, _now.until = 1 << 62, time.monotonic() + SECONDS
    _now.cpu, _now.steps = time.thread_time() + SECONDS, 0
    try:
        _now.left = BUDGET + BUDGET_PER_ITEM * _size(values)
        yield
    finally:
        del _now.left


def render(source: str, **arguments: Any) -> tuple[str, list[tuple[int, int]]]:
    """Call transformers' `render_jinja_template` for one chat, under `limits`. Return its text and
    the spans of generation blocks."""
    with limits(arguments):
        chat = arguments.pop("chat")
        texts, spans = _render([chat], chat_template=source, **arguments)
        return texts[0], spans[0] if spans else []


def pay(count: int) -> None:
    """Deduct `count` from the budget. Raise TemplateLimit if nothing is left, or the time is up."""
    left = _now.left = _now.left - count
    if left < 0:
        raise TemplateLimit(
            f"the chat template works without end: it handles more than {BUDGET:,} characters or items, and "
            f"{BUDGET_PER_ITEM} for each that it is given"
        )
    # Not every time: reading the clock takes longer than most steps. Both clocks must be over, so
    # that a busy machine gives a template more time.
    _now.steps += 1
    if (
        (count > 1000 or _now.steps & 15 == 0)
        and time.monotonic() > _now.until
        and time.thread_time() > _now.cpu
    ):
        raise TemplateLimit(
            f"the chat template works without end: it takes more than {SECONDS:.0f} s"
        )


def _check(count: int) -> None:
    """Raise TemplateLimit if the budget cannot cover `count`, without deducting it: the exact size
    is paid once it is known."""
    if count > _now.left:
        pay(count)


def _pay_for(value: Any) -> Any:
    """Pay for everything that `value` holds, as often as it holds it, and return it."""
    if type(value) is str:
        pay(len(value))
    elif value is not None and type(value) is not bool:
        pay(_size(value))
    return value


def _size(value: Any) -> int:
    """Return the number of characters and items of a value. A list that holds another one twice
    counts it twice: it takes no more memory, but as long to write or compare."""
    sizes: dict[int, int] = {}

    def of(value: Any) -> int:
        kind = type(value)
        if kind is str:
            return len(value) + 1
        if kind is int or kind is bool or value is None:
            _check_number(value or 0)
            return 1
        if isinstance(value, (str, bytes)):
            return len(value) + 1
        if isinstance(value, Namespace):
            value = value._Namespace__attrs
        if not isinstance(value, _HOLDERS):
            return 1
        if (known := sizes.get(id(value))) is not None:
            return known
        sizes[id(value)] = 1  # a value that holds itself is written as dots
        total = 1
        if isinstance(value, Mapping):
            for key, item in value.items():
                total += of(key) + of(item)
        else:
            for item in value:
                total += of(item)
        sizes[id(value)] = total
        return total

    return of(value)


_VIEWS: tuple[Any, ...] = (type({}.keys()), type({}.values()), type({}.items()))
_HOLDERS: tuple[Any, ...] = (dict, list, tuple, set, frozenset, Mapping, *_VIEWS)


def _length(value: Any) -> int:
    """Return the length of a value, 1 if it has none."""
    try:
        return len(value)
    except TypeError:
        return 1


def _check_number(value: int) -> None:
    """Raise TemplateLimit for an integer of too many bits."""
    if value.bit_length() > MOST_BITS:
        raise TemplateLimit(f"the chat template computes a number of more than {MOST_BITS:,} bits")


def _check_counts(values: Iterable[Any]) -> int:
    """Return the sum of counts, widths and lengths of texts. Raise TemplateLimit for a count that
    is too large."""
    total = 0
    for value in values:
        if isinstance(value, int):
            if abs(value) > MOST_DIGITS:
                raise TemplateLimit(
                    f"the chat template asks for a width or count of more than {MOST_DIGITS:,}"
                )
            total += abs(value)
        elif isinstance(value, str):
            total += len(value)
    return total


def _check_format(text: str, *values: Any) -> None:
    """Check the result's size for `%` and `format`: a width stands in the text or is a value, and
    each placeholder may take any of the values."""
    widths = sum(min(int(digits[:9]), 10**9) for digits in re.findall(r"\d+", text))
    if re.search(r"%[^a-zA-Z%]*\*|\{[^}]*\{", text):
        widths += sum(abs(value) for value in values if isinstance(value, int))
    _check(widths + (text.count("%") + text.count("{")) * _size(values))


def _loop(items: Any, weight: int) -> Any:
    """Return what a loop iterates over, and pay for it. `weight` is the most characters that the
    template writes per iteration."""
    if isinstance(items, Iterator):
        return _paid(items, weight)
    pay(_length(items) * weight)
    return items


def _paid(items: Iterator[Any], weight: int) -> Iterator[Any]:
    """Yield the items and pay for each."""
    for item in items:
        pay(weight)
        yield item


def _listed(value: Any) -> Any:
    """Return an iterator as a paid list; other values pass through."""
    return list(_paid(value, 1)) if isinstance(value, Iterator) else value


class _Environment(ImmutableSandboxedEnvironment):
    """Extends transformers' template environment such that everything that may take long is paid
    for."""

    intercepted_binops = frozenset(("+", "*", "**", "%", "//"))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Payments().visit(super()._parse(source, name, filename))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Pay for an operator, or check the size of its result, before it is computed."""
        if operator == "+":
            if type(left) is type(right) is str:
                pay(len(left) + len(right))
                return left + right
            pay(_length(left) + _length(right))
        elif isinstance(left, str) and operator == "%":
            _check_format(left, *(right if isinstance(right, tuple) else [right]))
        elif operator == "*" and not (
            isinstance(left, int | float) and isinstance(right, int | float)
        ):
            pay(_times(left, right))
        elif isinstance(left, int) and isinstance(right, int):
            _check_number(left)
            _check_number(right)
            if operator == "**" and left.bit_length() * abs(right) > MOST_BITS:
                raise TemplateLimit(
                    f"the chat template computes a number of more than {MOST_BITS:,} bits"
                )
        result = super().call_binop(context, operator, left, right)
        return _pay_for(result) if operator == "%" else result

    def call(__self, __context: Any, __function: Any, *args: Any, **kwargs: Any) -> Any:
        """Pay for a call by its arguments and its result."""
        pay(1)
        owner = getattr(__function, "__self__", None)
        if isinstance(__function, LoopContext):
            pay(_length(args[0] if args else ()) * __self.weight)
        elif isinstance(owner, (str, bytes, int, list, tuple, dict)):
            # A method would run through an iterator without paying: as a list it is paid for.
            args = tuple(map(_listed, args))
            _check_method(owner, __function.__name__, [*args, *kwargs.values()])
        elif not isinstance(__function, Macro | type) and not isinstance(owner, Namespace):
            args = tuple(map(_pay_for, args))
        result = super().call(__context, __function, *args, **kwargs)
        if isinstance(result, str):
            pay(len(result))
        elif not isinstance(result, Mapping):
            pay(_length(result))
        return result

    def getitem(self, obj: Any, argument: Any) -> Any:
        return super().getitem(
            obj, argument if isinstance(argument, (str, int, slice)) else _pay_for(argument)
        )

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return `str.format` with a check of the widths."""
        written = super().wrap_str_format(value)
        if written is None:
            return None
        text = value.__self__

        @wraps(written)
        def limited(*args: Any, **kwargs: Any) -> str:
            _check_format(text, *args, *kwargs.values())
            return written(*args, **kwargs)

        return limited

    weight: int
    """Characters of the template: the most that one iteration of a recursive loop writes."""


def _times(left: Any, right: Any) -> int:
    """Return the number of items of a product of a number and a text or list."""
    count, many = (left, right) if isinstance(left, int) else (right, left)
    return _length(many) * max(count, 0) if isinstance(count, int) else 1


def _check_method(owner: Any, name: str, values: list[Any]) -> None:
    """Pay for a method of a text, number or container, and check how large its result may be."""
    size = len(owner) if isinstance(owner, str | bytes) else _size(owner)
    pay(size)
    for value in values:
        _pay_for(value)
    if name in ("replace", "join") and values and isinstance(owner, str):
        _check(_length(values[0]) * (size + 1) if name == "join" else _grown(owner, values))
    elif name in GROWING:
        _check((size + 1) * (_check_counts(values) + _size(values)))


def _grown(text: str, values: list[Any]) -> int:
    """Return the number of characters after one text is replaced by another."""
    old, new = (value if isinstance(value, str) else "" for value in (*values, "", "")[:2])
    return len(text) + text.count(old) * len(new)


def _paying(name: str, function: Callable[..., Any], place: int) -> Callable[..., Any]:
    """Return a filter or test that pays before it runs. `place` is the index of the value among the
    arguments that jinja passes."""

    @wraps(function)
    def paid(*args: Any, **kwargs: Any) -> Any:
        given = list(args)
        others = [*given[place + 1 :], *kwargs.values()]
        if name in SHALLOW:
            count = _length(given[place])
            pay(count)
            if name in ("batch", "slice"):
                _check((count + 1) * _check_counts(others))
        else:
            given[place] = value = _listed(given[place])
            _pay_for(value)
            counts = _check_counts(map(_pay_for, others))
            if name == "replace" and isinstance(value, str):
                _check(_grown(value, others))
            elif name == "format" and isinstance(value, str):
                _check_format(value, *others)
            elif name == "join" or name in GROWING:
                _check((_size(value) if name in GROWING else _length(value)) * (counts + 1))
            elif name == "sum" and not isinstance(others[-1] if others else 0, int | float):
                _check(_length(value) * _size(value))
        result = function(*given, **kwargs)
        if isinstance(result, str):
            pay(len(result))
        return result

    return paid


class _Payments(NodeTransformer):
    """Rewrites a template's syntax tree so that loop iterations, concatenations and comparisons
    pay."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        """Let the loop pay per iteration for the text constants inside it."""
        self.generic_visit(node)
        weight = 1 + sum(len(text.data) for text in node.find_all(nodes.TemplateData))
        weight += sum(
            len(const.value) for const in node.find_all(nodes.Const) if isinstance(const.value, str)
        )
        node.iter = nodes.Filter(node.iter, "megalite_loop", [nodes.Const(weight)], [], None, None)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Concat:
        """Let every part of a concatenation that is no constant pay."""
        self.generic_visit(node)
        node.nodes = [
            part if isinstance(part, nodes.Const) else _payment(part) for part in node.nodes
        ]
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        """Let both sides of a comparison pay."""
        self.generic_visit(node)
        sides = [node.expr, *(operand.expr for operand in node.ops)]
        if len(sides) == 2 and any(isinstance(side, nodes.Const) for side in sides):
            return node  # with one value, nothing deep is compared
        node.expr = _payment(node.expr)
        for operand in node.ops:
            operand.expr = _payment(operand.expr)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Pair:
        """Let a dictionary's key pay, unless it is a constant."""
        self.generic_visit(node)
        if not isinstance(node.key, nodes.Const):
            node.key = _payment(node.key)
        return node


def _payment(node: nodes.Expr) -> nodes.Filter:
    """Return the expression wrapped in a payment."""
    return nodes.Filter(node, "megalite_pay", [], [], None, None)


@lru_cache(maxsize=64)
def _compiled(source: str) -> Any:
    """Compile a template in the paying environment, cached by its source."""
    theirs = chat_template_utils._compile_jinja_template("").environment
    # A copy of transformers' own environment with our methods: its settings stay those of the
    # installed version.
    ours = object.__new__(_Environment)
    ours.__dict__.update(theirs.__dict__)
    ours.overlayed, ours.linked_to, ours.cache = True, theirs, None
    ours.finalize, ours.weight = _pay_for, len(source)
    # To some filters jinja passes a context, an evaluation context or an environment as first
    # argument.
    place = {name: int(hasattr(found, "jinja_pass_arg")) for name, found in theirs.filters.items()}
    ours.filters = {
        name: _paying(name, found, place[name])
        for name, found in theirs.filters.items()
        if name not in LEFT_OUT
    }
    ours.filters |= {"megalite_loop": _loop, "megalite_pay": _pay_for}
    ours.tests = dict(theirs.tests)
    for name in COMPARING:
        ours.tests[name] = _paying(
            name, theirs.tests[name], int(hasattr(theirs.tests[name], "jinja_pass_arg"))
        )
    ours.globals = {name: found for name, found in theirs.globals.items() if name != "lipsum"}
    return ours.from_string(source)


def _own_render() -> Callable[..., Any]:
    """Return a copy of transformers' function that compiles templates with `_compiled`. Raise
    DataError for a version that works differently."""
    theirs = chat_template_utils.render_jinja_template
    if "_compile_jinja_template" not in theirs.__code__.co_names:
        raise DataError(
            "this version of transformers compiles chat templates in an unknown way; install another one"
        )
    names = theirs.__globals__ | {"_compile_jinja_template": _compiled}
    copied = types.FunctionType(
        theirs.__code__, names, theirs.__name__, theirs.__defaults__, theirs.__closure__
    )
    copied.__kwdefaults__ = theirs.__kwdefaults__
    return copied


_render = _own_render()
