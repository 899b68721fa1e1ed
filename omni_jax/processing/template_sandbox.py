"""Chat templates as programs of strangers: jinja2's sandbox, with limits of time and of size.

jinja2's own sandbox keeps a template away from Python's internals, and lets it take all time and memory there is: by
``'x' * 10**10``, by doubling a text forty times, by loops in loops; even before it is rendered, for constants are
computed when it is compiled. Here nothing is computed then. While it is rendered, a meter looks at every value that is
made, at every iteration of a loop and at every call. What a chat template has no use for is left out:
``str.format``, paddings, most filters, ``lipsum``.
"""

# ruff: noqa: N802, the names of jinja2's visitors

from __future__ import annotations

import contextvars
import datetime
import functools
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from typing import Any

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.filters
import jinja2.nodes
import jinja2.sandbox
import jinja2.utils

MAX_SOURCE = 2**18
"""Characters of a template; published ones have up to 20,000."""
MAX_SECONDS = 10.0
"""Of one rendering."""
MAX_SIZE = 2**24
"""Of one value: characters of its text, about."""
MAX_TOTAL = 2**26
"""Characters and items of all values that one rendering makes."""
MAX_RANGE = jinja2.sandbox.MAX_RANGE
"""Numbers of a ``range``."""
_MAX_BITS = 4096  # of a whole number
_MAX_MESSAGE = 1000  # characters of an error that a template raises
_MAX_TIME_FORMAT = 200  # characters

_FILTERS = """abs capitalize count d default dictsort e escape first float int items last length list lower map max min
    reject rejectattr reverse safe select selectattr sort string title trim unique upper wordcount""".split()
# whose results are about as long as the texts that they are given; ``replace`` and ``join`` are measured before
_TEXT_METHODS = frozenset(
    """capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit isidentifier islower
    isnumeric isprintable isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind
    rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title upper""".split()
)


class TemplateLimitError(jinja2.TemplateRuntimeError):
    """A template that takes more than a chat template may."""


class _Meter:
    """What one rendering has taken so far."""

    def __init__(self) -> None:
        self._end = time.monotonic() + MAX_SECONDS
        self._remaining = MAX_TOTAL
        # of lists and dictionaries by id, for one that is made of others is measured in one step; with the value
        # itself, so that no other gets its id
        self._sizes: dict[int, tuple[Any, int]] = {}

    def tick(self) -> None:
        """Looks at the clock."""
        if time.monotonic() > self._end:
            raise TemplateLimitError(f"it takes longer than {MAX_SECONDS:g} seconds")

    def spend(self, amount: int) -> None:
        """Counts characters or items that are made."""
        self._remaining -= amount
        if self._remaining < 0:
            raise TemplateLimitError(f"it makes more than {MAX_TOTAL:,} characters and items")

    def add(self, value: Any) -> Any:
        """Counts a value that has been made."""
        self.tick()
        self.measure(value)
        if isinstance(value, str | list | tuple | dict):
            self.spend(len(value))
        return value

    def measure(self, value: Any) -> int:
        """About how many characters a value's text has, with all that is in it."""
        if isinstance(value, str):
            size = len(value)
        elif isinstance(value, int):
            size = 8 + value.bit_length() // 3
        elif isinstance(value, list | tuple | dict | KeysView | ItemsView | ValuesView):
            size = self._measure_container(value)
        else:
            size = 8
        return check_size(size)

    def _measure_container(self, value: Any) -> int:
        if id(value) in self._sizes:
            return self._sizes[id(value)][1]
        items: Iterable[Any] = value
        if isinstance(value, dict):
            items = [*value.keys(), *value.values()]
        elif isinstance(value, ItemsView):
            items = [part for pair in value for part in pair]  # not as pairs, which live no longer than this
        # checked item by item, so that a list of a list of a list ... ends at the first that is too much
        size = 2
        for item in items:
            size = check_size(size + 2 + self.measure(item))
        self._sizes[id(value)] = (value, size)
        return size


# of the rendering that this thread is at; filters and operators are not told whose they are
_METER: contextvars.ContextVar[_Meter] = contextvars.ContextVar("template_meter")


def check_size(size: int) -> int:
    """The size, unless it is too large for one value."""
    if size > MAX_SIZE:
        raise TemplateLimitError(f"it makes a value of more than {MAX_SIZE:,} characters")
    return size


def count_text(text: str) -> str:
    """Counts a text that something outside of the template has made for it."""
    return _METER.get().add(text)


def render(template: jinja2.Template, values: Mapping[str, Any]) -> str:
    """Renders within the limits.

    Raises:
      TemplateLimitError: if the template takes more.
      Exception: whatever else a program may raise.
    """
    token = _METER.set(_Meter())
    try:
        return template.render(values)
    finally:
        _METER.reset(token)


class _CodeGenerator(jinja2.compiler.CodeGenerator):
    """Compiles without computing anything, and has every value that is made counted."""

    def _output_child_to_const(self, node: jinja2.nodes.Expr, frame: Any, finalize: Any) -> str:
        # what is written between the tags; any other constant is computed when it is rendered
        if isinstance(node, jinja2.nodes.TemplateData):
            return node.data
        raise jinja2.nodes.Impossible

    def visit_EvalContextModifier(self, node: jinja2.nodes.EvalContextModifier, frame: Any) -> None:
        self.fail("autoescape is not supported", node.lineno)

    def visit_For(self, node: jinja2.nodes.For, frame: Any) -> None:
        counted = jinja2.nodes.EnvironmentAttribute("count_iterations")
        node.iter = jinja2.nodes.Call(counted, [node.iter], [], None, None, lineno=node.lineno)
        super().visit_For(node, frame)

    def visit_Concat(self, node: jinja2.nodes.Concat, frame: Any) -> None:
        self.write("environment.concat_values((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: jinja2.nodes.List, frame: Any) -> None:
        self._visit_counted(super().visit_List, node, frame)

    def visit_Dict(self, node: jinja2.nodes.Dict, frame: Any) -> None:
        self._visit_counted(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: jinja2.nodes.Tuple, frame: Any) -> None:
        if node.ctx == "load":
            self._visit_counted(super().visit_Tuple, node, frame)
        else:  # names that something is assigned to
            super().visit_Tuple(node, frame)

    def visit_Getitem(self, node: jinja2.nodes.Getitem, frame: Any) -> None:
        if isinstance(node.arg, jinja2.nodes.Slice):  # any other gives what is there already
            self._visit_counted(super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)

    def _visit_counted(self, visit: Callable[[Any, Any], None], node: jinja2.nodes.Node, frame: Any) -> None:
        self.write("environment.count_value(")
        visit(node, frame)
        self.write(")")


class _Namespace(jinja2.utils.Namespace):
    """What ``namespace()`` makes; as text it does not unfold what is in it."""

    def __repr__(self) -> str:
        return "<namespace>"


class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """A sandbox for chat templates, with blocks trimmed as transformers does it.

    A template of it is rendered by ``render``.
    """

    code_generator_class = _CodeGenerator
    intercepted_binops = frozenset(jinja2.sandbox.SandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        extensions = ["jinja2.ext.loopcontrols", _GenerationTag]
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, optimized=False, finalize=count_output, extensions=extensions
        )
        for name in ("lipsum", "cycler", "joiner"):
            del self.globals[name]
        self.globals |= {
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }
        self.filters = {name: _counted(self.filters[name]) for name in _FILTERS}
        self.filters |= {"join": _join_filter, "replace": _replace_filter}
        self.tests = {name: _counted(test) for name, test in self.tests.items()}

    def concat(self, pieces: Iterable[str]) -> str:  # type: ignore[override]
        """What compiled templates join their pieces with, those of macros and of all of their text."""
        return _join("", pieces)

    def concat_values(self, values: Iterable[Any]) -> str:
        """The operator ``~``."""
        return _join("", [str(count_output(value)) for value in values])

    def count_value(self, value: Any) -> Any:
        """Counts a value that a compiled template has made."""
        return _METER.get().add(value)

    def count_iterations(self, items: Iterable[Any]) -> Iterator[Any]:
        """What a loop goes over."""
        meter = _METER.get()
        for item in items:
            meter.tick()
            yield item

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operator, after its operands are known to give no more than a value may be."""
        if operator == "%" and isinstance(left, str):
            raise TemplateLimitError("it formats a text by %, which is not supported")
        if operator == "*":
            _check_product(left, right)
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * max(1, right))
        return _METER.get().add(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """A call; the names leave all others to the arguments."""
        meter = _METER.get()
        meter.tick()
        meter.measure(args)
        meter.measure(kwargs)
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str) and __obj.__name__ == "join":
            return _join(owner, *args)
        if isinstance(owner, str) and __obj.__name__ == "replace":
            return _replace(owner, *args)
        return meter.add(super().call(__context, __obj, *args, **kwargs))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may have it; of texts and numbers, no method that makes long ones of short ones."""
        owner = getattr(value, "__self__", None)
        if isinstance(owner, str):
            return attr in _TEXT_METHODS
        if isinstance(owner, bytes | int | float | complex | type):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """Nothing: ``str.format`` is no method that ``is_safe_attribute`` allows."""


def _counted(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or test whose arguments and result are counted."""

    @functools.wraps(function)  # with what jinja2 is to give to it as the first argument
    def call(*args: Any, **kwargs: Any) -> Any:
        meter = _METER.get()
        meter.measure(args)
        meter.measure(kwargs)
        return meter.add(function(*args, **kwargs))

    return call


def count_output(value: Any) -> Any:
    """A value that is written as text."""
    meter = _METER.get()
    meter.tick()
    meter.spend(meter.measure(value))
    return value


def _check_product(left: Any, right: Any) -> None:
    meter = _METER.get()
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
    for value, count in ((left, right), (right, left)):
        if isinstance(value, str | list | tuple) and isinstance(count, int):
            check_size(max(meter.measure(value), 1) * count)


def _check_bits(bits: int) -> None:
    if bits > _MAX_BITS:
        raise TemplateLimitError(f"it computes a number of more than {_MAX_BITS} bits")


def _join(separator: str, items: Iterable[str]) -> str:
    meter = _METER.get()
    size = 0
    texts = []
    for item in items:
        meter.tick()
        texts.append(item)
        size = check_size(size + len(item) + len(separator))
    return meter.add(separator.join(texts))


def _replace(text: str, old: str, new: str, count: int = -1) -> str:
    # an empty text is found between all characters, and at both ends
    places = text.count(old)
    check_size(len(text) + (min(places, count) if count >= 0 else places) * len(new))
    return _METER.get().add(text.replace(old, new, count))


@jinja2.pass_environment
def _join_filter(environment: jinja2.Environment, value: Iterable[Any], d: Any = "", attribute: Any = None) -> str:
    if attribute is not None:
        value = map(jinja2.filters.make_attrgetter(environment, attribute), value)
    return _join(str(d), (str(count_output(item)) for item in value))


def _replace_filter(s: Any, old: Any, new: Any, count: int | None = None) -> str:
    return _replace(str(count_output(s)), str(old), str(new), -1 if count is None else count)


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(str(message)[:_MAX_MESSAGE])


def _strftime_now(form: str) -> str:
    if len(form) > _MAX_TIME_FORMAT:
        raise jinja2.TemplateError(f"strftime_now has {len(form)} characters; it may have {_MAX_TIME_FORMAT}")
    return datetime.datetime.now().strftime(form)


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}``, by which training finds the answers: what is in it is written as it is."""

    tags = {"generation"}

    def parse(self, parser: Any) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
