"""YAML text <-> plain data, by the types of YAML 1.2 and within bounds.

PyYAML reads YAML 1.1, where `010` is 8, `1:30` is 90 and 1e-5 is a text.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml

from marlhf.common.errors import UserError, one_line

_MOST_VALUES = 20_000  # with every alias written out; a configuration has some hundred
_DEEPEST = 50  # levels of lists and mappings; JSON readers stop at some hundred
_MOST_DIGITS = 1000
_TAG = "tag:yaml.org,2002:"
_KINDS = ("str", "int", "float", "bool", "null", "seq", "map", "merge")

# the core schema of YAML 1.2 (section 10.3.2), and merge keys, which everybody has kept
_SCALARS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)"
        r"|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "merge": (r"<<", "<"),
}
_PATTERNS = {
    _TAG + kind: re.compile(rf"(?:{pattern})\Z") for kind, (pattern, _) in _SCALARS.items()
}
_HALVES = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_YAML_1_1_BOOLS = re.compile(r"yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF")


def _fault(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[str, list[Any]]] = {}  # pyright: ignore[reportIncompatibleVariableOverride]

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        """A node, unless it is one too many, or too deep."""
        self._count = getattr(self, "_count", 0) + 1
        self._depth = getattr(self, "_depth", 0) + 1
        event: Any = self.peek_event()
        for size, limit, problem in (
            (self._count, _MOST_VALUES, f"it has more than {_MOST_VALUES} values"),
            (self._depth, _DEEPEST, f"nested too deeply, over {_DEEPEST} levels"),
        ):
            if size > limit:
                raise yaml.constructor.ConstructorError(None, None, problem, event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        """A scalar; JSON escapes a character beyond 16 bits as two halves, which are joined."""
        node: Any = super().compose_scalar_node(anchor)
        node.value = _HALVES.sub(
            lambda pair: pair[0].encode("utf-16", "surrogatepass").decode("utf-16"), node.value
        )
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """A mapping without a key given twice: before merge keys add those of others."""
        mapping = super().compose_mapping_node(anchor)
        assert mapping is not None
        keys = set()
        for node, _ in mapping.value:
            if not isinstance(node, yaml.ScalarNode):
                raise _fault("a key must be a text", node)
            merges = node.tag == f"{_TAG}merge"
            _check_scalar(node)
            value = "<<" if merges else self.construct_object(node)
            if keys & {value, str(value)}:  # 1, 1.0 and true are one key
                raise _fault(f"key {one_line(str(value), 60)!r} is given twice", node)
            keys |= {value, str(value)}
        return mapping

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge the mappings of merge keys; a mapping's own keys win over theirs.

        PyYAML 6.0.4 would otherwise give way to what a merged mapping had itself merged.
        """
        super().flatten_mapping(node)
        node.value = list({key.value: (key, value) for key, value in node.value}.values())

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """`010` is ten."""
        text = str(self.construct_scalar(node))
        bases = {"0o": 8, "0x": 16}
        return int(text.removeprefix("0o"), bases.get(text[:2], 10))

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        """`1e-5` is a number."""
        text = str(self.construct_scalar(node)).lower()
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))


class _Dumper(yaml.SafeDumper):
    """Texts that YAML 1.1 or 1.2 would take for something else get quotation marks."""


for _kind, (_, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _kind, _PATTERNS[_TAG + _kind], list(_first))
_Loader.add_constructor(f"{_TAG}int", _Loader.construct_yaml_int)
_Loader.add_constructor(f"{_TAG}float", _Loader.construct_yaml_float)


def parse_yaml(text: str, source: str) -> Any:
    """YAML text -> plain data. Raises UserError, naming the line."""
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node, {})
        return loader.construct_document(node)
    except RecursionError:
        raise UserError(f"{source}: not valid YAML: nested too deeply") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{source}{line}: not valid YAML: {one_line(problem)}") from None
    except (ValueError, OverflowError):  # "\\UFFFFFFFF"
        line = f", line {loader.line + 1}" if loader is not None else ""
        raise UserError(f"{source}{line}: not valid YAML: an escape is no character") from None
    finally:
        if loader is not None:
            loader.dispose()


def dump_yaml(value: Any) -> str:
    """Plain data -> YAML text, which `parse_yaml` and readers of YAML 1.1 read back alike."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _check(node: yaml.Node, sizes: dict[int, int | None]) -> int:
    """Count the values of a node, with its aliases written out.

    Raises ConstructorError for more values than a configuration has, or values it cannot hold.
    """
    counted = sizes.get(id(node), 0)
    if counted is None:
        raise _fault("it holds itself", node)
    if counted:
        return counted
    sizes[id(node)] = None
    if node.tag not in [_TAG + kind for kind in _KINDS]:
        raise _fault(f"could not determine a constructor for the tag {node.tag!r}", node)
    size = 1
    if isinstance(node, yaml.ScalarNode):
        _check_scalar(node)
    else:
        pairs = isinstance(node, yaml.MappingNode)
        for child in (n for pair in node.value for n in pair) if pairs else node.value:
            size += _check(child, sizes)
    if size > _MOST_VALUES:
        raise _fault(f"with its aliases it has more than {_MOST_VALUES} values", node)
    sizes[id(node)] = size
    return size


def _check_scalar(node: yaml.ScalarNode) -> None:
    """Raise ConstructorError for a text that misfits its tag, or that readers disagree on."""
    pattern = _PATTERNS.get(node.tag)
    if pattern is not None and not pattern.match(node.value):  # `!!null x`
        kind = node.tag.removeprefix(_TAG)
        raise _fault(f"{one_line(repr(node.value), 60)} is not what the tag !!{kind} says", node)
    if node.tag == f"{_TAG}int" and len(node.value) > _MOST_DIGITS:
        raise _fault(f"a number has more than {_MOST_DIGITS} digits", node)
    if any("\ud800" <= letter <= "\udfff" for letter in node.value):
        raise _fault("a text holds half of a character (a lone surrogate)", node)
    if node.style is None and _YAML_1_1_BOOLS.fullmatch(node.value):
        raise _fault(
            f"{node.value} means true or false to some readers and a text to others; write true or "
            f'false, or "{node.value}" in quotation marks',
            node,
        )
