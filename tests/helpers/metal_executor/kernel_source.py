"""The function that MLX writes around the body of a custom kernel."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

TYPES = {
    mx.bool_: "bool",
    mx.int8: "int8_t",
    mx.int16: "int16_t",
    mx.int32: "int32_t",
    mx.int64: "int64_t",
    mx.uint8: "uint8_t",
    mx.uint16: "uint16_t",
    mx.uint32: "uint32_t",
    mx.uint64: "uint64_t",
    mx.float16: "float16_t",
    mx.bfloat16: "bfloat16_t",
    mx.float32: "float",
}
ATTRIBUTES = {
    "dispatch_quadgroups_per_threadgroup": "uint",
    "dispatch_simdgroups_per_threadgroup": "uint",
    "dispatch_threads_per_threadgroup": "uint3",
    "grid_origin": "uint3",
    "grid_size": "uint3",
    "quadgroup_index_in_threadgroup": "uint",
    "quadgroups_per_threadgroup": "uint",
    "simdgroup_index_in_threadgroup": "uint",
    "simdgroups_per_threadgroup": "uint",
    "thread_execution_width": "uint",
    "thread_index_in_quadgroup": "uint",
    "thread_index_in_simdgroup": "uint",
    "thread_index_in_threadgroup": "uint",
    "thread_position_in_grid": "uint3",
    "thread_position_in_threadgroup": "uint3",
    "threadgroup_position_in_grid": "uint3",
    "threadgroups_per_grid": "uint3",
    "threads_per_grid": "uint3",
    "threads_per_simdgroup": "uint",
    "threads_per_threadgroup": "uint3",
}
CONSTANT_ELEMENTS = 8  # an input with fewer elements is in the address space `constant`
BODY_MARK = "\n#line 1\n"  # messages count lines from the body's first line, 1


@dataclass(frozen=True)
class Parameter:
    """A buffer of the kernel.

    Attributes:
        declaration: in the signature, without the number of the buffer.
        argument: for a C++ function that calls the kernel; `{}` stands for the buffer.
        index: of the input or output.
        kind: `input`, `shape`, `strides`, `ndim` or `output`.
    """

    declaration: str
    argument: str
    index: int
    kind: str


@dataclass(frozen=True)
class KernelSource:
    """A kernel as MLX compiles it, for given inputs.

    Attributes:
        name: of the function; equal texts have equal names.
        header: what stands before the function.
        template: the line `template <...>`, or nothing.
        specialisation: the arguments of the template, `<...>`, or nothing.
        parameters: the buffers, in order.
        attributes: names of the attributes of a thread that the body uses.
        body: of the function.
    """

    name: str
    header: str
    template: str
    specialisation: str
    parameters: tuple[Parameter, ...]
    attributes: tuple[str, ...]
    body: str

    @classmethod
    def write(
        cls,
        name: str,
        inputs: Sequence[tuple[str, mx.array]],
        outputs: Sequence[tuple[str, mx.Dtype]],
        body: str,
        header: str = "",
        template: Sequence[tuple[str, bool | int | mx.Dtype]] = (),
        atomic_outputs: bool = False,
    ) -> KernelSource:
        """Write the function for inputs of these types and sizes."""
        parameters = []
        for index, (input_name, array) in enumerate(inputs):
            space = "constant" if array.size < CONSTANT_ELEMENTS else "device"
            pointer = f"const {TYPES[array.dtype]}*"
            sign, star = ("&", "*") if array.ndim == 0 else ("*", "")
            declaration = f"const {space} {TYPES[array.dtype]}{sign} {input_name}"
            parameters.append(Parameter(declaration, f"{star}({pointer}){{}}", index, "input"))
            # MLX looks for these names in the text, so that longer names count too.
            for kind, form in (("shape", "int*"), ("strides", "int64_t*"), ("ndim", "int&")):
                if array.ndim > 0 and f"{input_name}_{kind}" in body:
                    declaration = f"const constant {form} {input_name}_{kind}"
                    argument = f"(const {form}){{}}" if kind != "ndim" else "*(const int*){}"
                    parameters.append(Parameter(declaration, argument, index, kind))
        for index, (output_name, dtype) in enumerate(outputs):
            form = f"atomic<{TYPES[dtype]}>" if atomic_outputs else TYPES[dtype]
            declaration = f"device {form}* {output_name}"
            parameters.append(Parameter(declaration, f"({form}*){{}}", index, "output"))
        kinds = [
            "bool" if isinstance(x, bool) else "int" if isinstance(x, int) else "typename"
            for _, x in template
        ]
        names = [f"{kind} {x}" for kind, (x, _) in zip(kinds, template, strict=True)]
        arguments = [TYPES[x] if isinstance(x, mx.Dtype) else str(int(x)) for _, x in template]
        parts = [name, *arguments]
        for _, x in inputs:
            constant = x.ndim > 0 and x.size < CONSTANT_ELEMENTS
            parts.append(TYPES[x.dtype] + ("s" if x.ndim == 0 else "c" if constant else ""))
        parts += [TYPES[dtype] for _, dtype in outputs]
        return cls(
            name="custom_kernel_" + "_".join(parts).replace("-", "m"),
            header=header,
            template=f"template <{', '.join(names)}>" if template else "",
            specialisation=f"<{', '.join(arguments)}>" if template else "",
            parameters=tuple(parameters),
            attributes=tuple(x for x in ATTRIBUTES if x in body),
            body=body,
        )

    @property
    def metal(self) -> str:
        """The text for Apple's compiler. MLX puts its own helpers before it."""
        text = self._function(self.body)
        if self.template:
            function = self.name + self.specialisation
            text += f'\ntemplate [[host_name("{self.name}")]] [[kernel]] decltype({function}) '
            text += f"{function};\n"
        return text

    @property
    def cpp(self) -> str:
        """The text for a C++ compiler, with a function `metal_body` that runs one thread."""
        arguments = [x.argument.format(f"buffers[{i}]") for i, x in enumerate(self.parameters)]
        arguments += [_attribute(name) for name in self.attributes]
        function = self._function(BODY_MARK + with_threadgroup_variables(self.body))
        return (
            '#include "metal_stdlib.h"\n'
            # The address space `constant` is constant without `const`, which C++ takes once.
            + re.sub(r"\bconst\s+constant\b|\bconstant\s+const\b|\bconstant\b", "const", function)
            + '\nextern "C" void metal_body(void** buffers) {\n'
            + "  const scheduler::Attributes& at = scheduler::metal_attributes();\n  (void)at;\n"
            + f"  {self.name}{self.specialisation}({', '.join(arguments)});\n}}\n"
        )

    def _function(self, body: str) -> str:
        parameters = [f"  {x.declaration} [[buffer({i})]]" for i, x in enumerate(self.parameters)]
        parameters += [f"  {ATTRIBUTES[x]} {x} [[{x}]]" for x in self.attributes]
        parameters_text = ",\n".join(parameters)
        template = f"{self.template}\n" if self.template else ""
        signature = f"{template}[[kernel]] void {self.name}(\n{parameters_text}) {{\n"
        return f"{self.header}{signature}{body}\n}}\n"


def _attribute(name: str) -> str:
    """The value of an attribute in C++."""
    vectors = {
        "dispatch_threads_per_threadgroup": "dispatched_group_size",
        "grid_size": "grid_size",
        "thread_position_in_grid": "position_in_grid",
        "thread_position_in_threadgroup": "position_in_group",
        "threadgroup_position_in_grid": "group_position",
        "threadgroups_per_grid": "groups",
        "threads_per_grid": "grid_size",
        "threads_per_threadgroup": "group_size",
    }
    size = "(at.group_size[0] * at.group_size[1] * at.group_size[2])"
    dispatched = size.replace("group_size", "dispatched_group_size")
    scalars = {
        "dispatch_quadgroups_per_threadgroup": f"({dispatched} + 3) / 4",
        "dispatch_simdgroups_per_threadgroup": "at.dispatched_simdgroups",
        "grid_origin": "uint3(0)",
        "quadgroup_index_in_threadgroup": "at.index_in_group / 4",
        "quadgroups_per_threadgroup": f"({size} + 3) / 4",
        "simdgroup_index_in_threadgroup": "at.simdgroup",
        "simdgroups_per_threadgroup": "at.simdgroups",
        "thread_execution_width": "32u",
        "thread_index_in_quadgroup": "at.lane % 4",
        "thread_index_in_simdgroup": "at.lane",
        "thread_index_in_threadgroup": "at.index_in_group",
        "threads_per_simdgroup": "32u",
    }
    if name in scalars:
        return scalars[name]
    return "uint3({0}[0], {0}[1], {0}[2])".format(f"at.{vectors[name]}")


_DECLARATION = re.compile(
    r"(?P<before>(?:^|[;{}])\s*(?:\[\[[^\]]*\]\]\s*)?)(?:alignas\([^)]*\)\s*)?"
    r"threadgroup\s+(?P<declared>[^;={}]*?)\s*;",
    re.MULTILINE,
)
_DECLARATOR = re.compile(r"(?P<name>[A-Za-z_]\w*)\s*(?P<dimensions>(?:\[[^\]]*\]\s*)*)$")


def with_threadgroup_variables(body: str) -> str:
    """The body, whose variables in threadgroup memory are references to what all threads share.

    Pointers and references to threadgroup memory stay as they are.
    """
    tags = iter(range(1_000_000))

    def rewrite(match: re.Match[str]) -> str:
        declared = match["declared"]
        if set("*&") & set(re.sub(r"\[[^\]]*\]", "", declared)):
            return match[0]
        first, *others = _split(declared)
        declarator = _DECLARATOR.search(first)
        assert declarator is not None, declared
        kind = first[: declarator.start()].strip()
        text = match["before"]
        for part in (first[declarator.start() :], *others):
            found = _DECLARATOR.search(part.strip())
            assert found is not None, declared
            form = f"{kind} {found['dimensions'].strip()}".strip()
            text += f"auto& {found['name']} = metal::threadgroup_variable<{form}, {next(tags)}>();"
        return text + "\n" * (match[0].count("\n") - text.count("\n"))

    # Twice: a declaration that follows another shares its semicolon with it.
    return _DECLARATION.sub(rewrite, _DECLARATION.sub(rewrite, body))


def _split(text: str) -> list[str]:
    """The parts of a text between commas that are in no brackets."""
    parts, depth, start = [], 0, 0
    for i, sign in enumerate(text):
        depth += (sign in "<[(") - (sign in ">])")
        if sign == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]
