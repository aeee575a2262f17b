"""Turns PTX, as nvcc made it of kernels.cu, into C++ for the emulation, so that what the compiler made runs, too.

    python tests/cuda/ptx2cpp.py kernels.ptx FOLDER N

writes FOLDER/ptx_0.cpp to ptx_N-1.cpp, and ptx_table.cpp, the same table as table.cpp.  One C++ statement for each
instruction (ptx.h has the functions); an instruction that nobody has met so far is an error.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path

TYPES = {f"{kind}{width}": f"{'u' if kind == 'b' else kind}{width}" for kind in "bus" for width in (8, 16, 32, 64)}
TYPES |= {"f32": "f32", "pred": "bool"}
SPECIAL = {
    f"%{ptx}.{axis}": f"(u32){cpp}.{axis}"
    for axis in "xyz"
    for ptx, cpp in (("tid", "threadIdx"), ("ctaid", "blockIdx"), ("ntid", "blockDim"), ("nctaid", "gridDim"))
}
SPECIAL["%laneid"] = "(u32)emu::lane()"
COMPARE = {
    "lt": "<",
    "gt": ">",
    "le": "<=",
    "ge": ">=",
    "eq": "==",
    "ne": "!=",
    "lo": "<",
    "hi": ">",
    "ls": "<=",
    "hs": ">=",
}
LOGIC = {"and": "&", "or": "|", "xor": "^"}


class UnknownError(Exception):
    """An instruction or operand that has no translation."""


class Module:
    """Names of the module: arrays in device memory, and where arrays in shared memory begin."""

    def __init__(self, text: str):
        arrays = r"^(?:\.visible |\.weak )?\.(?:global|const) (.*?) = \{(.*?)\};"
        found = re.findall(arrays, text, re.MULTILINE | re.DOTALL)
        self.arrays = {re.search(r"(\w+)\[\d*\]$", head)[1]: (head, body) for head, body in found}
        self.shared = {
            name: int(size or 0) for name, size in re.findall(r"\.shared \.align \d+ \.b8 (\w+)\[(\d*)\];", text)
        }

    def symbol(self, name: str) -> str | None:
        if name in self.shared:
            if not self.shared[name]:
                return "SHARED_BEGIN"
            return f"shared_address(emu::fixed_shared(&key_{name}, {self.shared[name]}))"
        return f"(u64)(uintptr_t)module_data.{name}" if name in self.arrays else None

    def declarations(self) -> str:
        """The arrays, in one object, so that one comparison says whether an address is in them."""
        lines = ["struct module_arrays {"]
        for name, (head, _) in self.arrays.items():
            align, kind, size = re.search(r"\.align (\d+) \.(\w+) \w+\[(\d+)\]", head).groups()
            lines.append(f"    alignas({align}) {TYPES[kind]} {name}[{size}];")
        return "\n".join([*lines, "};", "extern const module_arrays module_data;"])

    def definitions(self) -> str:
        values = "\n".join(f"    {{ {body} }}," for _, body in self.arrays.values())
        return f"extern const module_arrays module_data = {{\n{values}\n}};"


def split(text: str) -> list[str]:
    """The operands of an instruction; {..} and [..] are one each."""
    return [o.strip() for o in re.findall(r"\s*(\{[^}]*\}|\[[^\]]*\]|[^,]+)", text) if o.strip()]


def parts(operand: str) -> list[str]:
    return [v.strip() for v in operand.strip("{}").split(",")]


def c_type(name: str) -> str:
    if name not in TYPES:
        raise UnknownError(f"type {name}")
    return TYPES[name]


class Function:
    """The statements of one kernel."""

    def __init__(self, name: str, module: Module):
        self.name, self.module = name, module
        self.tables: dict[str, list[str]] = {}

    # --- operands

    def value(self, x: str) -> str:
        if x in SPECIAL:
            return SPECIAL[x]
        if re.fullmatch(r"%\w+", x):
            return f"v_{x[1:]}"
        if m := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})", x):
            return f"as<f32>(0x{m[1]}u)"
        if x.startswith(f"{self.name}_param_"):
            return "(u64)(uintptr_t)argument"
        m = re.fullmatch(r"([A-Za-z_$][\w$]*)(?:\+(\d+))?", x)
        if m and m[1].startswith("__local_depot"):
            return "(u64)(uintptr_t)local"
        if m and (symbol := self.module.symbol(m[1])):
            return f"({symbol} + {m[2]})" if m[2] else symbol
        raise UnknownError(f"operand {x}")

    def read(self, t: str, x: str) -> str:
        """An operand as a value of a type."""
        kind = c_type(t)
        if t == "pred":
            return "true" if x in ("1", "-1") else "false" if x == "0" else self.value(x)
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", x):
            number = int(x.rstrip("U"), 0) & ((1 << 64) - 1)
            return f"({kind}){number:#x}ull"
        return f"as<{kind}>({self.value(x)})"

    def set(self, register: str, value: str) -> str:
        return "" if register == "_" else f"set({self.value(register)}, {value});"

    def address(self, x: str) -> tuple[str, str]:
        """What is between [ and ] without the offset, and the offset."""
        m = re.fullmatch(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+))?\s*\]", x)
        if not m:
            raise UnknownError(f"address {x}")
        return m[1], m[2] or "0"

    def pointer(self, x: str, wide: bool) -> str:
        base, offset = self.address(x)
        return f"({self.value(base)} + ({'u64' if wide else 'u32'}){int(offset, 0)})".replace("(u64)-", "(u64)(s64)-")

    # --- instructions

    def memory(self, op: list[str], o: list[str]) -> str:
        kind = op[-1]
        t = c_type(kind)
        count = next((int(p[1:]) for p in op if re.fullmatch(r"v[248]", p)), 1)
        loads = op[0] == "ld"
        values, place = (o[0], o[1]) if loads else (o[1], o[0])
        registers = parts(values) if count > 1 else [values]
        if len(registers) != count:
            raise UnknownError(".".join(op))
        size = int(kind[1:]) // 8
        if "param" in op and not self.address(place)[0].startswith("%"):
            offset = int(self.address(place)[1], 0)
            return " ".join(
                self.set(r, f"load_parameter<{t}>((const char *)argument + {offset + i * size})")
                for i, r in enumerate(registers)
            )
        space = "shared" if any(p.split("::")[0] == "shared" for p in op) else "global"
        base = self.pointer(place, space == "global")
        if "release" in op:
            if loads or count > 1 or size != 4 or space != "global" or "sys" not in op:
                raise UnknownError(".".join(op))
            value = self.read("u32", values)
            return f"{{ u64 p = {base}; check_global<{t}>(p); emu::store_release((void *)p, {value}); }}"
        lines = [f"{{ {'u64' if space == 'global' else 'u32'} p = {base};"]
        if count > 1:
            lines.append(f'if (p % {size * count}) emu::die("an address is not aligned");')
        loaded = [f"{t} t{i} = load_{space}<{t}>(p + {i * size});" for i in range(count)]
        if loads:
            lines += loaded + [self.set(r, f"t{i}") for i, r in enumerate(registers)]
        else:
            lines += [f"store_{space}<{t}>(p + {i * size}, {self.read(kind, r)});" for i, r in enumerate(registers)]
        return " ".join([*lines, "}"])

    def mov(self, op: list[str], o: list[str]) -> str:
        kind = op[-1]
        for one, many in ((o[1], o[0]), (o[0], o[1])):
            if not many.startswith("{"):
                continue
            items = parts(many)
            width = int(kind[1:]) // len(items)
            if many == o[0]:
                lines = [f"u64 whole = {self.read(kind, one)};"]
                lines += [self.set(r, f"(u{width})(whole >> {width * i})") for i, r in enumerate(items)]
                return f"{{ {' '.join(lines)} }}"
            bits = " | ".join(f"(u64){self.read(f'u{width}', r)} << {width * i}" for i, r in enumerate(items))
            return self.set(one, f"({c_type(kind)})({bits})")
        return self.set(o[0], self.read(kind, o[1]))

    def cvta(self, op: list[str], o: list[str]) -> str:
        if "shared" in op and "to" in op:
            return self.set(o[0], f"(u64)shared_address((void *){self.read('u64', o[1])})")
        if "shared" in op:
            return self.set(o[0], f"(u64)(uintptr_t)at_shared({self.read('u32', o[1])})")
        return self.set(o[0], self.read("u64", o[1]))

    def cvt(self, op: list[str], o: list[str]) -> str:
        to, of = op[-2], op[-1]
        if of in ("f16", "bf16") and to == "f32":
            widen = "half_to_float" if of == "f16" else "bf16_to_float"
            return self.set(o[0], f"{widen}({self.read('u16', o[1])})")
        if to == "f32" and "rn" in op:
            return self.set(o[0], f"(f32){self.read(of, o[1])}")
        if of == "f32" and ("rzi" in op or "rni" in op):
            whole = f"{'truncf' if 'rzi' in op else 'rintf'}({self.read(of, o[1])})"
            return self.set(o[0], f"to_int<{c_type(to)}>({whole})")
        if "f" in to + of or "sat" in op:
            raise UnknownError(".".join(op))
        return self.set(o[0], f"({c_type(to)}){self.read(of, o[1])}")

    def setp(self, op: list[str], o: list[str]) -> str:
        test, kind = op[1], op[-1]
        a, b = self.read(kind, o[1]), self.read(kind, o[2])
        if test in ("num", "nan"):
            truth = f"({a} == {a} && {b} == {b})" if test == "num" else f"({a} != {a} || {b} != {b})"
        elif test in COMPARE and not (test in ("ne",) and kind == "f32"):
            truth = f"({a} {COMPARE[test]} {b})"
        elif test == "ne":
            truth = f"({a} < {b} || {a} > {b})"
        elif test.endswith("u") and test[:-1] in COMPARE:
            truth = f"(!({a} == {a} && {b} == {b}) || {a} {COMPARE[test[:-1]]} {b})"
        else:
            raise UnknownError(".".join(op))
        if op[2] in LOGIC:
            truth = f"({truth} {LOGIC[op[2]]} {self.read('pred', o[3])})"
        targets = o[0].split("|")
        lines = [f"bool t = {truth};", self.set(targets[0], "t")]
        if len(targets) > 1 and targets[1] != "_":
            lines.append(self.set(targets[1], "!t"))
        return f"{{ {' '.join(lines)} }}"

    def arithmetic(self, op: list[str], o: list[str]) -> str:
        name, kind = op[0], op[-1]
        if kind == "f32":
            return self.float_arithmetic(op, o)
        t, x = c_type(kind), [self.read(kind, v) for v in o[1:3]]
        if name in ("add", "sub") and op[1] != "cc":
            return self.set(o[0], f"{name}<{t}>({x[0]}, {x[1]})")
        if name in ("mul", "mad"):
            wide = f"{kind[0].replace('b', 'u')}{2 * int(kind[1:])}"
            product = f"mul_wide<{wide}, {t}>" if op[1] == "wide" else f"mul_{op[1]}<{t}>"
            value = f"{product}({x[0]}, {x[1]})"
            if name == "mad":
                of = wide if op[1] == "wide" else t
                value = f"add<{of}>({value}, {self.read(of, o[3])})"
            return self.set(o[0], value)
        if name in ("div", "rem"):
            return self.set(o[0], f"({t})({x[0]} {'/' if name == 'div' else '%'} {x[1]})")
        if name in ("min", "max"):
            return self.set(o[0], f"{'least' if name == 'min' else 'largest'}<{t}>({x[0]}, {x[1]})")
        if name == "neg":
            return self.set(o[0], f"sub<{t}>(0, {x[0]})")
        if name == "abs":
            return self.set(o[0], f"({x[0]} < 0 ? sub<{t}>(0, {x[0]}) : {x[0]})")
        raise UnknownError(".".join(op))

    def float_arithmetic(self, op: list[str], o: list[str]) -> str:
        """Only what is rounded once, to the nearest even, and keeps what is denormal."""
        name, x = op[0], [self.read("f32", v) for v in o[1:]]
        if "ftz" in op or "approx" in op or "full" in op:
            raise UnknownError(".".join(op))
        if name in ("min", "max"):
            of = {"min": "least", "max": "largest"}[name] + ("_or_nan" if "NaN" in op else "")
            return self.set(o[0], f"{of}({x[0]}, {x[1]})")
        if name in ("neg", "abs"):
            bits = self.read("u32", o[1])
            return self.set(o[0], f"as<f32>({bits} {'^ 0x80000000u' if name == 'neg' else '& 0x7fffffffu'})")
        if name == "copysign":
            sign_of, rest = self.read("u32", o[1]), self.read("u32", o[2])
            return self.set(o[0], f"as<f32>(({sign_of} & 0x80000000u) | ({rest} & 0x7fffffffu))")
        if op[1] != "rn":
            raise UnknownError(".".join(op))
        sign = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
        if name in sign:
            return self.set(o[0], f"{x[0]} {sign[name]} {x[1]}")
        value = {"fma": f"__builtin_fmaf({', '.join(x)})", "sqrt": f"sqrtf({x[0]})", "rcp": f"1.0f / {x[0]}"}.get(name)
        if not value:
            raise UnknownError(".".join(op))
        return self.set(o[0], value)

    def bits(self, op: list[str], o: list[str]) -> str:
        name, kind = op[0], op[-1]
        x = [self.read(kind, v) for v in o[1:]]
        t = c_type(kind)
        if name in LOGIC:
            return self.set(o[0], f"({t})({x[0]} {LOGIC[name]} {x[1]})")
        if name == "not":
            return self.set(o[0], f"!{x[0]}" if kind == "pred" else f"({t})~{x[0]}")
        if name in ("shl", "shr"):
            shift = "shift_left" if name == "shl" else "shift_right"
            return self.set(o[0], f"{shift}<{t}>({x[0]}, {self.read('u32', o[2])})")
        if name == "shf":
            flags = f"{str(op[1] == 'l').lower()}, {str(op[2] == 'wrap').lower()}"
            return self.set(o[0], f"funnel({flags}, {', '.join(x)})")
        if name == "prmt" and len(op) == 2:
            return self.set(o[0], f"__byte_perm({', '.join(x)})")
        if name == "bfe":
            return self.set(o[0], f"extract<{t}>({x[0]}, {self.read('u32', o[2])}, {self.read('u32', o[3])})")
        if name == "bfi":
            return self.set(o[0], f"insert<{t}>({x[0]}, {x[1]}, {self.read('u32', o[3])}, {self.read('u32', o[4])})")
        if name == "lop3":
            return self.set(o[0], f"lop3({', '.join(x)})")
        one = {"popc": "__popc", "clz": "__clz", "brev": "__brev"}.get(name)
        if one and int(kind[1:]) == 32:
            return self.set(o[0], f"(u32){one}({x[0]})")
        if name == "bfind" and kind == "u32":
            return self.set(o[0], f"find_bit({x[0]}, {str('shiftamt' in op).lower()})")
        raise UnknownError(".".join(op))

    def products(self, op: list[str], o: list[str]) -> str:
        if op[0] == "dp2a" and op[1:] == ["lo", "s32", "s32"]:
            return self.set(o[0], f"dp2a_ss({', '.join(self.read('s32', v) for v in o[1:])})")
        if op[0] == "dp4a":
            kind = {"u32.s32": "dp4a_us", "s32.s32": "dp4a_ss"}.get(".".join(op[1:]))
            if not kind:
                raise UnknownError(".".join(op))
            a = self.read("u32" if kind == "dp4a_us" else "s32", o[1])
            return self.set(o[0], f"{kind}({a}, {self.read('s32', o[2])}, {self.read('s32', o[3])})")
        if op[0] == "dp2a":
            signs = f"{c_type(op[2])}, {c_type(op[3])}, {str(op[1] == 'hi').lower()}"
            return self.set(o[0], f"dp2a<{signs}>({', '.join(self.read('u32', v) for v in o[1:])})")
        shape, signs = op[3], [str(p[0] == "s").lower() for p in op[7:9]]
        if shape not in ("m16n8k32", "m16n8k16") or op[4:7] != ["row", "col", "s32"] or op[7][1:] != "8":
            raise UnknownError(".".join(op))
        d, a, b, c = map(parts, o)
        halves = 2 if shape == "m16n8k32" else 1
        lists = [", ".join(self.read(kind, v) for v in words) for kind, words in (("s32", c), ("u32", a), ("u32", b))]
        words = f"unsigned a[] = {{ {lists[1]} }}, b[] = {{ {lists[2]} }};"
        call = f"{words} emu_mma<{', '.join(signs)}>(c, a, b, {halves});"
        back = " ".join(self.set(r, f"c[{i}]") for i, r in enumerate(d))
        return f"{{ int c[4] = {{ {lists[0]} }}; {call} {back} }}"

    def collective(self, op: list[str], o: list[str]) -> str:
        if op[0] == "shfl":
            target, inside = (o[0].split("|") + ["_"])[:2]
            x = [self.read("u32", v) for v in o[1:]]
            put = self.set(inside, "inside") if inside != "_" else ""
            call = f"shuffle({op[2].upper()}, {', '.join(x)}, &inside)"
            return f"{{ bool inside; u32 t = {call}; {self.set(target, 't')} {put} }}"
        if op[0] == "vote":
            of, mask = self.read("pred", o[1]), self.read("u32", o[2])
            call = {"ballot": "__ballot_sync", "any": "(bool)__any_sync", "all": "(bool)__all_sync"}[op[2]]
            return self.set(o[0], f"{call}({mask}, {of})")
        if op[0] == "redux":
            t = op[3].replace("b32", "u32")
            return self.set(o[0], f"__reduce_{op[2]}_sync({self.read('u32', o[2])}, {self.read(t, o[1])})")
        if op[:2] == ["bar", "warp"]:
            return f"__syncwarp({self.read('u32', o[0])});"
        if op[0] in ("bar", "barrier") and "sync" in op and o == ["0"]:
            return "__syncthreads();"
        raise UnknownError(".".join(op))

    def ldmatrix(self, op: list[str], o: list[str]) -> str:
        registers = parts(o[0])
        trans = str("trans" in op).lower()
        back = " ".join(self.set(r, f"r[{i}]") for i, r in enumerate(registers))
        call = f"ldmatrix<{trans}, {len(registers)}>(r, {self.pointer(o[1], False)});"
        return f"{{ u32 r[{len(registers)}]; {call} {back} }}"

    def copies(self, op: list[str], o: list[str]) -> str:
        if op[2] == "commit_group":
            return "copy_commit();"
        if op[2] in ("wait_group", "wait_all"):
            return "copy_commit(); emu::copy_finish(0);" if op[2] == "wait_all" else f"emu::copy_finish({o[0]});"
        size = int(o[2], 0)
        n = f"(int){self.read('u32', o[3])}" if len(o) > 3 else str(size)
        source = self.pointer(o[1], True)
        check = f"if ({n}) check_global<u8>(p, 1);"
        call = f"emu::copy_begin(at_shared({self.pointer(o[0], False)}), (void *)p, {n}, {size});"
        return f"{{ u64 p = {source}; {check} {call} }}"

    def branch(self, op: list[str], o: list[str]) -> str:
        if op[0] == "bra":
            return f"goto {label(o[0])};"
        if op[0] == "brx":
            cases = " ".join(f"case {i}: goto {label(x)};" for i, x in enumerate(self.tables[o[1]]))
            return f"switch ({self.read('u32', o[0])}) {{ {cases} }}"
        return "return;" if op[0] in ("ret", "exit") else 'emu::die("trap");'

    def selp(self, op: list[str], o: list[str]) -> str:
        kind = op[-1]
        return self.set(o[0], f"{self.read('pred', o[3])} ? {self.read(kind, o[1])} : {self.read(kind, o[2])}")

    def statement(self, op: list[str], o: list[str]) -> str:
        if op[0] in ("fence", "membar"):
            return ";"
        if op[:2] == ["cp", "async"]:
            return self.copies(op, o)
        for names, translate_one in self.families.items():
            if op[0] in names.split():
                return translate_one(self, op, o)
        raise UnknownError(".".join(op))

    families: dict[str, Callable[["Function", list[str], list[str]], str]] = {
        "ld ldu st": memory,
        "mov": mov,
        "cvta": cvta,
        "cvt": cvt,
        "setp": setp,
        "selp": selp,
        "add sub mul mad div rem min max neg abs copysign fma sqrt rcp": arithmetic,
        "and or xor not shl shr shf prmt bfe bfi lop3 popc clz brev bfind": bits,
        "dp4a dp2a mma": products,
        "ldmatrix": ldmatrix,
        "shfl vote redux bar barrier": collective,
        "bra brx ret exit trap": branch,
    }


def label(name: str) -> str:
    return "L" + re.sub(r"\W", "_", name)


def tidy(body: str) -> list[str]:
    """The lines of a function, one instruction or label each."""
    body = re.sub(r"//.*|/\*.*?\*/", "", body)
    body = re.sub(r",\s*\n\s*", ", ", body)
    body = re.sub(r"^\s*(\$?\w+):(?!:)", r"\1:;", body, flags=re.MULTILINE)
    lines = (line.strip() for line in re.split(r"[;\n]", body))
    left_out = (".loc ", ".loc\t", ".pragma", ".file")  # .local is something else
    return [line for line in lines if line and line not in "{}" and not line.startswith(left_out)]


def registers(line: str) -> str | None:
    m = re.match(r"\.reg \.(\w+)\s+(.*)", line)
    if not m:
        return None
    names: list[str] = []
    for item in m[2].split(","):
        many = re.fullmatch(r"%(\w+)<(\d+)>", item.strip())
        names += [f"v_{many[1]}{i}" for i in range(int(many[2]))] if many else [f"v_{item.strip().lstrip('%')}"]
    return f"    {c_type(m[1])} " + ", ".join(f"{name} = 0" for name in names) + ";"


def translate(name: str, body: str, module: Module) -> str:
    """The C++ of one kernel."""
    function, head, code = Function(name, module), [], []
    body, scratch = re.subn(r"\{\s*\.reg \.b64 %tmp;(.*?)\}", r"\1", body, flags=re.DOTALL)
    if scratch:
        head.append("    u64 v_tmp = 0;")
    lines = tidy(body)
    for i, line in enumerate(lines):
        if line.startswith(".branchtargets"):
            function.tables[lines[i - 1].rstrip(":")] = split(line.removeprefix(".branchtargets"))
    for line in lines:
        if declared := registers(line):
            head.append(declared)
        elif m := re.match(r"\.local \.align \d+ \.b8\s+\w+\[(\d+)\]", line):
            head.append(f"    alignas(16) char local[{m[1]}];")
        elif m := re.fullmatch(r"(\$?\w+):", line):
            code.append(f"{label(m[1])}: ;")
        elif not line.startswith("."):
            m = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", line, re.DOTALL)
            if not m:
                raise UnknownError(line)
            guard = f"if ({m[1]}v_{m[2][1:]}) " if m[2] else ""
            operands = split(re.sub(r"^(%\w+)\|(%\w+|_)", r"\1|\2", m[4]))
            try:
                code.append(f"    {guard}{function.statement(m[3].split('.'), operands)}")
            except (UnknownError, IndexError, KeyError) as error:
                raise UnknownError(f"{name}: {line}: {error}") from error
    signature = f"void {name}(const void *argument) {{"
    return "\n".join([signature, "    (void)argument;", *head, *code, "}"])


def main() -> None:
    text, folder, count = Path(sys.argv[1]).read_text(), Path(sys.argv[2]), int(sys.argv[3])
    module = Module(text)
    found = re.findall(r"\.visible \.entry (\w+)\((.*?)\)(.*?)\n\{(.*?)\n\}", text, re.DOTALL)
    start = '#include "cuda/dev.cuh"\n#include "ptx.h"\nnamespace ptx {\n'
    keys = "\n".join(f"[[maybe_unused]] static const char key_{n} = 0;" for n, size in module.shared.items() if size)
    files = [[start, module.declarations(), keys] for _ in range(count)]
    rows, sizes = [], [0] * count
    for name, parameters, head, body in sorted(found, key=lambda f: -len(f[3])):
        i = sizes.index(min(sizes))
        sizes[i] += len(body)
        files[i].append(translate(name, body, module))
        size = re.search(r"\.param .*?\[(\d+)\]", parameters)[1]
        threads = re.search(r"\.maxntid (\d+)", head)[1]
        rows.append((name, size, threads))
    for i, lines in enumerate(files):
        (folder / f"ptx_{i}.cpp").write_text("\n".join([*lines, "}\n"]))
    table = [start, module.declarations(), module.definitions()]
    table += [
        "bool own_data(const void *p, size_t n) {",
        "    const char *from = (const char *)&module_data;",
        "    return (const char *)p >= from && (const char *)p + n <= from + sizeof module_data;",
        "}",
    ]
    table += [f"void {name}(const void *argument);" for name, *_ in rows]
    table += ["}", "namespace emu {", "const kernel kernels[] = {"]
    table += [f'    {{ "{n}", {size}, {threads}, ptx::{n}, (const void *)ptx::{n} }},' for n, size, threads in rows]
    table += ["    { nullptr, 0, 0, nullptr, nullptr }", "};", "}", ""]
    (folder / "ptx_table.cpp").write_text("\n".join(table))


if __name__ == "__main__":
    try:
        main()
    except UnknownError as error:
        sys.exit(f"ptx2cpp: {error}")
